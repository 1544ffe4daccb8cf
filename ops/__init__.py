"""The vocabulary: NVFP4 operators in the namespace ``torch.ops.dsv4``, one file an operator.

Each file holds the schema, the shape and dtype checks that fake and real share, and the CPU reference, which is
registered as the operator's CPU kernel. Importing this package registers them all.
"""

from dsv4_compile.ops.dequantize_nvfp4 import dequantize_nvfp4
from dsv4_compile.ops.nvfp4_grouped_mm import nvfp4_grouped_mm
from dsv4_compile.ops.nvfp4_mm import nvfp4_mm
from dsv4_compile.ops.nvfp4_moe import nvfp4_moe
from dsv4_compile.ops.nvfp4_weight_mm import nvfp4_weight_mm
from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4, rms_norm_quantize_nvfp4_with_norm
from dsv4_compile.ops.swiglu_quantize_nvfp4 import swiglu_quantize_nvfp4
from dsv4_compile.ops.swizzle_block_scales import swizzle_block_scales, unswizzle_block_scales
from dsv4_compile.ops.topk_router import topk_router

__all__ = [
    "dequantize_nvfp4",
    "nvfp4_grouped_mm",
    "nvfp4_mm",
    "nvfp4_moe",
    "nvfp4_weight_mm",
    "quantize_nvfp4",
    "rms_norm_quantize_nvfp4",
    "rms_norm_quantize_nvfp4_with_norm",
    "swiglu_quantize_nvfp4",
    "swizzle_block_scales",
    "topk_router",
    "unswizzle_block_scales",
]
