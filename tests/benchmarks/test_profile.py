"""Kernels of a trace by class and scope."""

import pytest

from neva_jax.benchmarks.profile import Kernel, classify, read_kernels, scope, scopes_of, table
from neva_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT", "gemm"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n", "gemm"),
        ("gemm_fusion_dot_15", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void transformer_engine::cast_transpose_fused_kernel", "quantize"),
        ("memcpy128", "copy"),
        ("loop_dynamic_update_slice_fusion_3", "copy"),
        ("Memset 0", "fill"),
        ("loop_broadcast_fusion_7", "fill"),
        ("input_reduce_fusion", "reduction"),
        ("loop_add_multiply_fusion", "elementwise"),
        ("set_case_condition", "other"),
    ],
)
def test_classes(name, label):
    assert classify(name) == label


def test_table_per_step():
    ms = 1e6
    kernels = [
        Kernel("nvjet_1", 0, 4 * ms, "mlp"),
        Kernel("nvjet_2", 4 * ms, 6 * ms, "mlp backward"),
        Kernel("ncclAllReduce", 5 * ms, 9 * ms),  # the first of its four milliseconds is hidden
        Kernel("loop_add_fusion_3", 10 * ms, 12 * ms),
    ]
    made = table([kernels], 2)
    assert made["kernels_ms"] == {"gemm": 3.0, "communication": 2.0, "elementwise": 1.0}
    assert (made["busy_ms"], made["idle_ms"], made["exposed_communication_ms"]) == (5.5, 0.5, 1.5)
    assert made["scopes_ms"] == {"": 3.0, "mlp": 2.0, "mlp backward": 1.0}
    assert made["top_kernels"][0] == {"name": "nvjet", "ms": 3.0, "runs": 1.0}


def test_scopes_of_a_program():
    program = """
  %fusion.12 = bf16[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(train_step)/jvp(mlp)/mul" stack_frame_id=1}
  ROOT gemm.3 = bf16[8]{0} custom-call(%p), metadata={op_name="jit(step)/transpose(jvp(attention))/bthk,hkd->btd/dot"}
  %copy.1 = bf16[8]{0} copy(%p)
  %add = f32[] add(%a, %b), metadata={op_name="jit(train_step)/vision_mlp/add"}
"""
    assert scopes_of(program) == {"fusion.12": "mlp", "gemm.3": "attention backward", "add": "vision_mlp"}
    assert (scope("jit(f)/while/body/attention/dot"), scope("jit(f)/add")) == ("attention", "rest")


def test_no_trace(tmp_path):
    with pytest.raises(UserError, match="holds no trace"):
        read_kernels(tmp_path, {})
