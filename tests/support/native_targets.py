"""Processors for which kernels are compiled: this one as it is, and as if it had less."""

import dataclasses
import importlib.util
import platform

import pytest

if importlib.util.find_spec("llvmlite") is None:
    TARGETS: list[object] = []
    CODE_TARGETS: list[object] = []
else:
    from gpt_xp_backends.native_backend.machine import Target, this_processor

    HERE = this_processor()
    IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
    AVX2 = Target(HERE.triple, "haswell", "+avx,+avx2,+fma,+f16c")
    PLAIN = Target(HERE.triple, "x86-64", "")
    VNNI = Target(HERE.triple, "alderlake", f"{AVX2.features},+avxvnni")
    ARM64 = Target("aarch64-unknown-linux-gnu", "generic", "+neon")
    _has_avx2 = all(HERE.has(feature) for feature in ("avx2", "fma", "f16c"))
    TARGETS = [
        pytest.param(HERE, id="this processor"),
        pytest.param(AVX2, id="AVX2", marks=pytest.mark.skipif(not (IS_X86 and _has_avx2), reason="no AVX2 here")),
        pytest.param(PLAIN, id="plain", marks=pytest.mark.skipif(not IS_X86, reason="not an x86 processor")),
    ]
    # Products of int8 codes, with and without the instruction that multiplies them.
    NO_VNNI = dataclasses.replace(HERE, cpu="skylake-avx512", features=f"{HERE.features},-avx512vnni")
    NO_VNNI = dataclasses.replace(NO_VNNI, features=NO_VNNI.features.replace("+avx512vnni,", ""))
    _has_vnni = pytest.mark.skipif(not HERE.has("avxvnni"), reason="this processor has no VNNI for AVX2")
    _has_avx512 = pytest.mark.skipif(not HERE.has("avx512f"), reason="this processor has no AVX-512")
    CODE_TARGETS = [
        *TARGETS,
        pytest.param(VNNI, id="AVX2 with VNNI", marks=_has_vnni),
        pytest.param(NO_VNNI, id="AVX-512 without VNNI", marks=_has_avx512),
    ]
