"""The autograd node of one layer and direction: where a kernel meets autograd and the recording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnngrad import bptt
from rnngrad.kernels.reference import KERNELS, Saved, Walk, Weights


class Recurrence(torch.autograd.Function):
    """One layer and direction, input product included; its backward reports to the open call."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: str,
        walk: Walk,
        call: bptt.Call | None,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        sentinel: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.autocast(x.device.type, enabled=False):
            gates = torch.nn.functional.linear(x, w_ih, b_ih)
            hs = walk.states(h_0)
            cs = None if c_0 is None else walk.states(c_0)
            saved = KERNELS[mode].forward(walk, Weights(w_hh, b_hh, w_hr), gates, hs, cs)
        ctx.mode, ctx.walk, ctx.call = mode, walk, call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w_ih, w_hh, b_hh, w_hr, *saved)
        # a copy, so that the caller may change the output in place as torch.nn's
        return walk.after(hs).clone(), walk.last(hs), None if cs is None else walk.last(cs)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "rnngrad.nn layers have no double backward (create_graph=True); run the layer's "
                "cell through rnngrad.nn.unroll, which has"
            )
        record = ctx.call is not None and ctx.call.enter_backward()
        x, w_ih, w_hh, b_hh, w_hr, *rest = ctx.saved_tensors
        saved = Saved(*rest)
        gates, hs, cs, _ = saved
        walk: Walk = ctx.walk
        kernel, weights = KERNELS[ctx.mode], Weights(w_hh, b_hh, w_hr)
        with torch.autocast(x.device.type, enabled=False):
            direct = torch.zeros_like(walk.after(hs)) if grad_output is None else grad_output
            if grad_h_n is not None:
                direct = walk.add_at_last(direct, grad_h_n)
            grads = kernel.backward(walk, weights, saved, direct, grad_c_n)
            if record:
                ctx.call.fill(grads.hidden, direct, grads.cell, grads.recurrent, walk.before(hs))
            # one product each, over all steps and rows at once
            input, recurrent = grads.input.flatten(0, 1), grads.recurrent.flatten(0, 1)
            needs = ctx.needs_input_grad
            grad_hr = None
            if w_hr is not None and cs is not None and needs[10]:
                projected = gates.chunk(4, -1)[3] * walk.after(cs).tanh()
                grad_hr = grads.hidden.flatten(0, 1).t() @ projected.flatten(0, 1)
            return (
                None,
                None,
                None,
                (input @ w_ih).view_as(x) if needs[3] else None,
                grads.h_0 if needs[4] else None,
                grads.c_0 if needs[5] else None,
                input.t() @ x.flatten(0, 1) if needs[6] else None,
                recurrent.t() @ walk.before(hs).flatten(0, 1) if needs[7] else None,
                input.sum(0) if needs[8] else None,
                recurrent.sum(0) if needs[9] else None,
                grad_hr,
                None,
            )
