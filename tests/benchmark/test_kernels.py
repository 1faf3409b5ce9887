"""Kernels by what they are for: names seen on an H100, and a profile taken here."""

from __future__ import annotations

import pytest
import torch

from e2llm.benchmark.kernels import Gap, KernelTime, class_of, gaps, gaps_between, kernel_times, seconds_by_class

SEEN = {
    "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NNN": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64": "attention forward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64": "attention backward",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)": "attention backward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_traits>": "attention backward",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>": "attention forward",
    "triton_per_fused__to_copy__unsafe_view_add_div_expand_mul_pow_sum_view_6": "normalisation and activations",
    "triton_poi_fused__unsafe_view_mul_silu_silu_backward_view_2": "normalisation and activations",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "normalisation and activations",
    "triton_red_fused__to_copy_arange_clamp_eq_exp_logsumexp_mul_ne_sub_unsqueeze_0": "loss",
    "liger_cross_entropy_kernel": "loss",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>": "optimizer",
    "update": "optimizer",
    "triton_poi_fused__to_copy_t_6": "copies",
    "triton_poi_fused__to_copy_1": "copies",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>": "copies",
    "void at::native::(anonymous namespace)::compute_grad_weight<float, long>": "other",
}


@pytest.mark.parametrize(("name", "kind"), SEEN.items(), ids=lambda value: value[:40])
def test_names_seen_on_a_gpu(name: str, kind: str) -> None:
    assert class_of(name) == kind


def test_idle_is_what_no_kernel_fills() -> None:
    kernels = [KernelTime("a", "loss", 0.25, 1), KernelTime("b", "copies", 0.5, 2), KernelTime("c", "loss", 0.5, 1)]
    assert seconds_by_class(kernels, 2.0) == {"loss": 0.75, "copies": 0.5, "idle": 0.75}
    assert list(seconds_by_class(kernels, 2.0)) == ["loss", "copies", "idle"]
    assert seconds_by_class(kernels, 1.0)["idle"] == 0.0, "kernels at once fill more than the step"


def test_a_real_profile_counts_calls_a_step_and_no_spans() -> None:
    a, profiler = torch.randn(64, 64), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    profiler.start()
    for _ in range(2):
        with torch.profiler.record_function("Optimizer.step#AdamW.step"):
            for _ in range(3):
                a = torch.mm(a, a) / 64
    profiler.stop()
    found = {kernel.name: kernel for kernel in kernel_times(profiler, 2)}
    assert found["aten::mm"].calls == 3 and found["aten::mm"].kind == "matrix products"
    assert not any("Optimizer.step" in name for name in found)
    assert [k.seconds for k in kernel_times(profiler, 2)] == sorted((k.seconds for k in found.values()), reverse=True)


def test_gaps_lie_between_the_last_end_and_the_next_start() -> None:
    spans = [(50.0, 60.0, "d"), (0.0, 10.0, "a"), (2.0, 30.0, "b"), (5.0, 8.0, "c"), (31.0, 40.0, "e")]
    assert gaps_between(spans) == [Gap(10e-6, "e", "d"), Gap(1e-6, "b", "e")]
    assert gaps_between([]) == []


def test_a_profile_of_a_cpu_has_no_gaps() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
    assert gaps(profiler) == []
