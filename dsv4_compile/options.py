"""The options of ``torch.compile(model, backend="dsv4", options={...})``: named, typed, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from dsv4_compile import nvfp4
from dsv4_compile.quantization import DEFAULT_EXCLUDE

# Without these the compiled code would hold copies of the weights, or one checkpoint's global scales as literals.
REQUIRED_BY_BACKEND: Mapping[str, Any] = {"freezing": True, "always_keep_tensor_constants": True}

# nvfp4: each activation of a product is quantised. bf16: none is, and only linears read their weights packed.
ACTIVATIONS = ("nvfp4", "bf16")

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """Options of the dsv4 backend.

    Attributes:
        gsa: granularity of the run-time activation global scale: ``tensor``, ``tensor_pow2`` or ``token``.
        activations: ``nvfp4`` (W4A4) or ``bf16`` (W4A16: no activation is quantised; linears read their weights packed,
            grouped products and experts run on weights dequantised to bf16).
        quantize_weights: pack eligible plain weights once at compile time; False compiles packed ones only.
        include: parameter-name patterns to pack, see :func:`dsv4_compile.quantize_`; None for every eligible one.
        exclude: parameter-name patterns to leave alone; nothing by default when ``include`` is given.
        merge_gemms: run the linears that read one activation as one GEMM.
        dump: file to which each graph is appended before and after the passes; "-" for standard error; "" for none.
        mode: a torch.compile mode, for when ``options`` is given (torch.compile does not take both). The ones with
            ``max-autotune`` also time the variants of our kernels for the shapes of each graph on a GPU, once: see
            :mod:`dsv4_compile.tuning`.
        inductor: every other option, checked against and handed to ``torch._inductor.config``.
    """

    gsa: str = "tensor"
    activations: str = "nvfp4"
    quantize_weights: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    merge_gemms: bool = True
    dump: str = ""
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def parse(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Checks what torch.compile hands over.

        Raises:
            ValueError: an unknown option (the message lists the known ones), or a value outside its range.
            TypeError: a value of the wrong type.
        """
        own: dict[str, Any] = {}
        inductor: dict[str, Any] = {}
        names = [option.name for option in fields(Options) if option.name != "inductor"]
        inductor_names = torch._inductor.config.get_config_copy()
        for key, value in (options or {}).items():
            name = str(key).replace("-", "_")
            if name in names:
                own[name] = value
            elif name in inductor_names:
                inductor[name] = _checked_inductor_option(name, value)
            else:
                close = difflib.get_close_matches(name, [*names, *inductor_names], n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(
                    f"dsv4: option must be one of {', '.join(names)} or an option of torch._inductor.config, "
                    f"got {key!r}{hint}"
                )
        if mode is not None:
            own["mode"] = mode
        for name in ("include", "exclude"):
            if isinstance(own.get(name), (list, tuple)):
                own[name] = tuple(own[name])
        if own.get("include") is not None:
            own.setdefault("exclude", ())  # what is asked for by name is packed, be it a router
        parsed = Options(**own, inductor=inductor)
        parsed._check()
        return parsed

    def _check(self) -> None:
        for name, kind in (
            ("quantize_weights", bool),
            ("merge_gemms", bool),
            ("dump", str),
            ("gsa", str),
            ("activations", str),
            ("mode", str),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"dsv4: option {name} must be a {kind.__name__}, got {value!r}")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            is_patterns = isinstance(value, tuple) and all(isinstance(pattern, str) for pattern in value)
            if not is_patterns and not (name == "include" and value is None):
                raise TypeError(f"dsv4: option {name} must be a list of parameter-name patterns, got {value!r}")
        for name, allowed in (("gsa", nvfp4.GRANULARITIES), ("activations", ACTIVATIONS), ("mode", MODES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"dsv4: option {name} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def tunes(self) -> bool:
        """Whether the variants of kernels are timed at compile time."""
        return self.mode.startswith("max-autotune")

    def inductor_config(self, dynamic: bool | None = None) -> dict[str, Any]:
        """The Inductor settings that mode and options amount to."""
        mode_options = {} if self.mode == "default" else torch._inductor.list_mode_options(self.mode, dynamic)
        return {**mode_options, **self.inductor}


def _checked_inductor_option(name: str, value: Any) -> Any:
    kind = torch._inductor.config.get_type(name)  # type: ignore[attr-defined]
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"dsv4: option {name} must be a {kind.__name__}, got {value!r}")
    if name in REQUIRED_BY_BACKEND and value != REQUIRED_BY_BACKEND[name]:
        raise ValueError(f"dsv4: option {name} must be {REQUIRED_BY_BACKEND[name]!r} for this backend, got {value!r}")
    return value
