"""Processors for which kernels are compiled: this one as it is, and as if it had less."""

import importlib.util
import platform

import pytest

if importlib.util.find_spec("llvmlite") is None:
    TARGETS: list[object] = []
    VNNI, needs_vnni = None, pytest.mark.skip(reason="llvmlite is not installed")
else:
    from gpt_xp_backends.native_backend.machine import Target, this_processor

    HERE = this_processor()
    IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
    AVX2 = Target(HERE.triple, "haswell", "+avx,+avx2,+fma,+f16c")
    PLAIN = Target(HERE.triple, "x86-64", "")
    VNNI = Target(HERE.triple, "alderlake", f"{AVX2.features},+avxvnni")
    needs_vnni = pytest.mark.skipif(not HERE.has("avxvnni"), reason="this processor has no VNNI for AVX2")
    ARM64 = Target("aarch64-unknown-linux-gnu", "generic", "+neon")
    _has_avx2 = all(HERE.has(feature) for feature in ("avx2", "fma", "f16c"))
    TARGETS = [
        pytest.param(HERE, id="this processor"),
        pytest.param(AVX2, id="AVX2", marks=pytest.mark.skipif(not (IS_X86 and _has_avx2), reason="no AVX2 here")),
        pytest.param(PLAIN, id="plain", marks=pytest.mark.skipif(not IS_X86, reason="not an x86 processor")),
    ]
