"""Peaks of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from neva_jax.planning.liveness import nbytes, peak_bytes

N = 64
A = jax.ShapeDtypeStruct((N, N), jnp.float32)
ARRAY = N * N * 4


def peak(function, *arguments) -> float:
    """In arrays of [N, N] f32."""
    return peak_bytes(jax.make_jaxpr(function)(*arguments)).total / ARRAY


def test_inputs_are_the_callers_and_a_product_is_a_buffer():
    assert peak(lambda a, b: a @ b, A, A) == 1


def test_what_no_product_reads_is_fused():
    # cos, exp and the sum of them never exist; only the product and the result do.
    assert peak(lambda a, b: jnp.exp(jnp.cos(a @ b)) + a, A, A) == 1


def test_an_operand_of_a_product_is_written_down():
    # exp(a) and b, then their product; both operands are there while it is computed
    assert peak(lambda a, b: jnp.exp(a) @ b, A, A) == 2
    assert peak(lambda a, b: jnp.exp(a) @ jnp.exp(b), A, A) == 3


def test_a_buffer_ends_with_its_last_reader():
    def chain(a, b):
        for _ in range(10):
            a = a @ b
        return a

    assert peak(chain, A, A) == 2


def test_an_elementwise_result_takes_the_place_of_what_ends():
    def chain(a, b):
        x = a @ b
        y = jnp.exp(x)  # in x's place
        return y @ b

    assert peak(chain, A, A) == 2


def test_what_a_fused_value_is_computed_from_lives_on():
    def program(a, b):
        x = a @ b
        y = x @ b
        return jnp.exp(x) * y  # exp(x) is fused here, so that x is still there

    assert peak(program, A, A) == 2


def test_views_are_no_buffers():
    assert peak(lambda a, b: (a.T.reshape(N, N) @ b).T, A, A) == 1


def test_dead_code_counts_nothing():
    def program(a, b):
        _ = (a @ b) @ (b @ a)
        return a @ a

    assert peak(program, A, A) == 1


def test_results_of_a_call_are_inlined():
    assert peak(lambda a, b: jax.jit(lambda x: jnp.exp(x) @ x)(a @ b), A, A) == 3


LAYERS = 5
STACK = jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32)


def test_a_loop_holds_its_stack_and_one_iteration():
    def body(carry, weight):
        # a slice of the weights and the product; the carry is outside
        return carry @ weight, carry

    # carry, stack of five; inside a slice and the product
    assert peak(lambda a, weights: jax.lax.scan(body, a, weights), A, STACK) == 1 + LAYERS + 2


def test_an_unrolled_loop_holds_several_iterations():
    def run(unroll):
        return peak(lambda a, w: jax.lax.scan(lambda x, y: (jnp.sin(x @ y), None), a, w, unroll=unroll)[0], A, STACK)

    assert run(3) - run(1) == 2 * (run(1) - 1)


def test_a_condition_holds_its_largest_branch():
    def program(choice, a):
        return jax.lax.cond(choice, lambda x: (x @ x) @ (x @ x), lambda x: x, a)

    assert peak(program, jax.ShapeDtypeStruct((), jnp.bool), A) == pytest.approx(1 + 3, rel=1e-3)


def test_inside_is_the_largest_loop():
    closed = jax.make_jaxpr(lambda a, w: jax.lax.scan(lambda x, y: (x @ y, None), a, w)[0])(A, STACK)
    assert peak_bytes(closed).inside == 2 * ARRAY


@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 2), (jnp.float32, 4), (jnp.int8, 1), (jnp.bool, 1)])
def test_bytes(dtype, size):
    assert nbytes(jax.ShapeDtypeStruct((3, 5), dtype)) == 15 * size
