# mypy: allow-untyped-defs
"""The Triton kernel of the divergence of next-token distributions; its launch is in triton.py beside this
file."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def divergence_kernel(student, teacher, kl, ce, targets, loss, gradient, vocabulary, BLOCK: tl.constexpr):
    """loss [N] and gradient [N, V] of a row of logits [N, V] each."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    student += row * vocabulary
    # the largest logits so far: below every logit, and not infinite, for differences of infinities are NaN
    top_s = tl.full([], -1e30, tl.float32)
    top_t = tl.full([], -1e30, tl.float32)
    sum_s = tl.zeros([], tl.float32)
    sum_t = tl.zeros([], tl.float32)
    cross = tl.zeros([], tl.float32)
    if teacher is not None:
        teacher += row * vocabulary
    for a in range(0, vocabulary, BLOCK):
        inside = a + columns < vocabulary
        s = tl.load(student + a + columns, mask=inside, other=-1e30).to(tl.float32)
        new_s = tl.maximum(top_s, tl.max(s, 0))
        sum_s = sum_s * _exp(top_s - new_s) + tl.sum(_exp(s - new_s), 0)
        top_s = new_s
        if teacher is not None:
            t = tl.load(teacher + a + columns, mask=inside, other=-1e30).to(tl.float32)
            new_t = tl.maximum(top_t, tl.max(t, 0))
            weight, shrink = _exp(t - new_t), _exp(top_t - new_t)
            sum_t = sum_t * shrink + tl.sum(weight, 0)
            cross = cross * shrink + tl.sum(tl.where(inside, weight * (t - s), 0.0), 0)
            top_t = new_t
    lse_s = top_s + tl.log(sum_s)
    lse_t = top_t
    total = tl.zeros([], tl.float32)
    share = tl.zeros([], tl.float32)
    of_kl = tl.zeros([], tl.float32)
    of_ce = tl.zeros([], tl.float32)
    target = tl.zeros([], tl.int64)
    if teacher is not None:
        lse_t = top_t + tl.log(sum_t)
        of_kl = tl.load(kl + row)
        total += of_kl * (cross / sum_t - lse_t + lse_s)
        share += of_kl
    if ce is not None:
        of_ce = tl.load(ce + row)
        target = tl.load(targets + row)
        total += of_ce * (lse_s - tl.load(student + target).to(tl.float32))
        share += of_ce
    tl.store(loss + row, total)
    if gradient is not None:
        gradient += row * vocabulary
        for a in range(0, vocabulary, BLOCK):
            inside = a + columns < vocabulary
            s = tl.load(student + a + columns, mask=inside, other=-1e30).to(tl.float32)
            d = share * _exp(s - lse_s)
            if teacher is not None:
                t = tl.load(teacher + a + columns, mask=inside, other=-1e30).to(tl.float32)
                d -= of_kl * _exp(t - lse_t)
            if ce is not None:
                d -= tl.where(a + columns == target, of_ce, 0.0)
            tl.store(gradient + a + columns, d.to(gradient.dtype.element_ty), mask=inside)
