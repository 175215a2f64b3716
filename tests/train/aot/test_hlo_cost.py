"""Cost estimates of compiled programs from their HLO text."""

# ruff: noqa: E501

import pytest

from train.aot.chips import CHIPS
from train.aot.hlo_cost import bytes_of, estimate_cost

V5E = CHIPS["v5e"]
SECOND = V5E.cycles_per_second

LOOP = """\
HloModule jit_f

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]) parameter(0)
  %inner = (s32[], f32[4]) while(%p), condition=%condition.2, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %fusion.1 = (s32[], f32[8,128]) fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(f)/transpose(jvp(rounds))/mul"}, backend_config={"estimated_cycles":"1000"}
}

%body.2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %fusion.2 = (s32[], f32[4]) fusion(%p), kind=kLoop, calls=%g, metadata={op_name="jit(f)/encoder/add"}, backend_config={"estimated_cycles":"10"}
}

%condition.1 (p: (s32[], f32[8,128])) -> pred[] {
  %constant.7 = s32[] constant(3)
  ROOT %compare = pred[] compare(%i, %constant.7), direction=LT
}

%condition.2 (p: (s32[], f32[4])) -> pred[] {
  ROOT %compare.2 = pred[] compare(%i, %j), direction=LT
}

ENTRY %main.9 (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %gather = (bf16[16], bf16[128]) all-gather-start(%x), dimensions={0}, metadata={op_name="jit(f)/gather/all_gather"}
  %gathered = bf16[128] all-gather-done(%gather)
  %sum = f32[8,128] all-reduce(%x), to_apply=%add, backend_config={"estimated_cycles":"7"}
  %unknown = f32[8,128] copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %splash_mha_fwd.1 = bf16[2,512,64] custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,4]{2,1,0}, bf16[2,512,108]{2,1,0}, bf16[2,512,108]{2,1,0}, bf16[2,512,64]{2,1,0}}, frontend_attributes={kernel_metadata={
"block_q": 512
}}, metadata={op_name="jit(f)/encoder/splash"}
  %window_attention_forward.2 = bf16[25,196,96]{2,1,0} custom-call(%qkv, %rel, %a), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[25,196,288]{2,1,0}, bf16[32,392]{1,0}, bf16[196,392]{1,0}}, metadata={op_name="jit(f)/windows/kernel"}
  %vmap_image_to_token_forward_.3 = bf16[8,256,4096] custom-call(%x, %pe, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,256,4096]{2,1,0}, bf16[256,4096]{1,0}, bf16[8,128,256]{2,1,0}}, metadata={op_name="jit(f)/updates/kernel"}
  %vmap_upscaling_forward_.3 = f32[8,4,16,4096] custom-call(%x, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,256,4096]{2,1,0}, bf16[256,256]{1,0}}, metadata={op_name="jit(f)/upscales/kernel"}
  %jvp_token_attention_forward_.1 = bf16[64,50,768]{2,1,0} custom-call(%qkv), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[64,50,2304]{2,1,0}}, metadata={op_name="jit(f)/among/kernel"}
  %token_attention_backward.1 = bf16[64,51,2304]{2,1,0} custom-call(%qkv, %d), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[64,51,2304]{2,1,0}, bf16[64,51,768]{2,1,0}}, metadata={op_name="jit(f)/among/kernel"}
  %mystery.4 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %loop = (s32[], f32[8,128]) while(%x), condition=%condition.1, body=%body.1
}
"""


def test_costs_of_loops_are_multiplied_and_scopes_become_phases():
    cost = estimate_cost(LOOP, V5E, {"encoder": "encoder", "rounds": "rounds"})
    expected = {"rounds": 3 * 1000, "encoder": 3 * 5 * 10, "other": 7}
    assert cost.seconds == pytest.approx({k: v / SECOND for k, v in expected.items()})


@pytest.mark.parametrize(
    "branches",
    ["true_computation=%a, false_computation=%b", "branch_computations={%a, %b}"],
)
def test_the_most_expensive_branch_of_a_conditional_counts(branches):
    text = f"""\
%a (p: f32[8]) -> f32[8] {{
  ROOT %fusion.1 = f32[8] fusion(%p), kind=kLoop, backend_config={{"estimated_cycles":"1000"}}
}}

%b (q: f32[8]) -> f32[8] {{
  ROOT %copy.1 = f32[8] copy(%q), backend_config={{"estimated_cycles":"10"}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  ROOT %conditional = f32[8] conditional(%is_finite, %x, %x), {branches}
}}
"""
    assert estimate_cost(text, V5E, {}).seconds == pytest.approx({"other": 1000 / SECOND})


def test_each_collective_is_counted_once():
    collectives = estimate_cost(LOOP, V5E, {}).collectives
    assert collectives == {
        "all-gather": {"count": 1, "bytes": 2 * (16 + 128), "asynchronous": 1, "phases": ["other"]},
        "all-reduce": {"count": 1, "bytes": 4 * 8 * 128, "asynchronous": 0, "phases": ["other"]},
    }


def test_kernels_with_a_cost_model_have_a_bound_and_others_are_listed():
    phases = ("encoder", "windows", "updates", "upscales", "among")
    cost = estimate_cost(LOOP, V5E, {name: name for name in phases})
    flops = 2 * 2 * 512 * 512 * (128 + 128)  # channels padded to lanes
    assert cost.kernel_seconds_bound["encoder"] == pytest.approx(flops / V5E.peak_flops / 0.7)
    windows = 853 * 3 * (25 + 2)  # 853 cycles for each of three heads
    assert cost.kernel_seconds_bound["windows"] == pytest.approx(windows / SECOND)
    image = 2 * 256 * 4096  # bytes
    tokens = 2 * 8 * 128 * 256
    # Eight arrays of this size are read, eight are written, and the positions are read eight times.
    moved = (8 + 8 + 8) * image + tokens
    assert cost.kernel_seconds_bound["updates"] == pytest.approx(moved / V5E.hbm_bandwidth)
    assert moved / V5E.hbm_bandwidth > 4 * 8 * 2768 / SECOND
    assert cost.kernel_seconds_bound["upscales"] == pytest.approx(4 * 8 * 5217 / SECOND)
    assert cost.kernel_seconds_bound["among"] == pytest.approx(1210 * (64 + 2) / SECOND)
    # There is no cost model for 51 tokens.
    assert cost.unmodeled_kernels == ["mystery", "token_attention_backward"]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("(bf16[3,5]{1,0}, pred[7])", 37),
        ("s32[]", 4),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert bytes_of(shape) == size
