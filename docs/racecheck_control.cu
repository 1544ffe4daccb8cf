// Does racecheck follow what orders two CTAs of a cluster? Each writes its shared memory, then reads the other's.
//
//     nvcc -arch=sm_90a -o control racecheck_control.cu; compute-sanitizer --tool racecheck ./control 1
//
// Mode 0: nothing between; 1: mbarriers (arrive.release.cluster, try_wait.acquire.cluster); 2: barrier.cluster.
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>
template <int MODE> __global__ void __cluster_dims__(2, 1, 1) exchange(float* out) {
  __shared__ float values[256];
  __shared__ alignas(8) uint64_t barrier;
  uint32_t rank; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  uint32_t bar = (uint32_t)__cvta_generic_to_shared(&barrier), mine = (uint32_t)__cvta_generic_to_shared(values);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(blockDim.x));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(mine + 4 * threadIdx.x), "f"((float)(rank * 1000 + threadIdx.x)) : "memory");
  uint32_t peer_bar, peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer_bar) : "r"(bar), "r"(rank ^ 1));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(mine), "r"(rank ^ 1));
  if (MODE == 1) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_bar) : "memory");
    asm volatile("{ .reg .pred p; R: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0; @p bra D; bra R; D: }" ::"r"(bar) : "memory");
  }
  if (MODE == 2) asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(peer + 4 * (threadIdx.x ^ 37)) : "memory");
  out[blockIdx.x * 256 + threadIdx.x] = value;
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
int main(int argc, char** argv) {
  int mode = argv[1][0] - '0'; float* out; cudaMalloc(&out, 64 * 1024);
  if (mode == 0) exchange<0><<<16, 256>>>(out); if (mode == 1) exchange<1><<<16, 256>>>(out); if (mode == 2) exchange<2><<<16, 256>>>(out);
  float host[4096]; cudaError_t e = cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
  int wrong = 0; for (int i = 0; i < 4096; i++) wrong += host[i] != (float)(((i / 256 % 2) ^ 1) * 1000 + (i % 256 ^ 37));
  printf("mode %d: %s, %d wrong\n", mode, cudaGetErrorString(e), wrong); return 0;
}
