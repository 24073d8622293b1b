"""The autograd node of one layer and direction: where a kernel meets autograd and the recording."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rnngrad import bptt
from rnngrad.contribution import OuterProducts, Total
from rnngrad.kernels import kernel_for
from rnngrad.kernels.interface import (
    Gradients,
    Incoming,
    Kernel,
    Part,
    Passed,
    Recording,
    Walk,
    Wanted,
    Weights,
)
from rnngrad.kernels.rowclip import RowClip


class Recurrence(torch.autograd.Function):
    """One layer and direction, input product included; its backward reports to the open call.

    Returns ``output``, ``h_n``, ``c_n`` or ``None``, and after them what the way back needs.
    """

    @classmethod
    def run(cls, *inputs: Any) -> tuple[Any, ...]:
        """``apply``, without its search for default values, slow as a small recurrence."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc, no-any-return]

    @staticmethod
    def forward(
        mode: str,
        walk: Walk,
        segments: int,
        clip: RowClip | None,
        keep: bool,
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
    ) -> tuple[Any, ...]:
        w = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
        kernel = kernel_for(mode, x, projected=w_hr is not None)
        if segments > 1:
            passed = _forward_in_segments(kernel, segments, walk, x, h_0, c_0, w)
        else:
            passed = kernel.forward(walk, x, h_0, c_0, w, keep)
        return (passed.output, passed.h_n, passed.c_n, *passed.saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        mode, ctx.walk, ctx.segments, ctx.clip, _, ctx.call, x, _, _, *weights, _ = inputs
        ctx.kernel = kernel_for(mode, x, projected=weights[-1] is not None)
        saved = output[3:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *saved)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        """Several runs at once, as by ``torch.vmap`` over stacked weights: the axis ``R``."""
        mode, walk, segments, clip, _, call, *tensors, sentinel = inputs
        # inside torch.vmap a tensor does not say whether it requires a gradient
        options = (mode, walk, segments, clip, torch.is_grad_enabled(), call)
        stacked: list[Any] = [
            tensor
            if tensor is None
            else tensor.expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[6:-1], strict=True)
        ]
        x, apply = stacked[0], cast(Any, Recurrence.apply)
        if x.dim() > 4:
            raise NotImplementedError("rnngrad.nn layers do not nest in torch.vmap")
        if kernel_for(mode, x, projected=tensors[-1] is not None).takes_runs:
            outputs = apply(*options, *stacked, sentinel)[:3]
        else:
            runs = zip(*(t if t is not None else [None] * len(x) for t in stacked), strict=True)
            each = [apply(*options, *run, sentinel)[:3] for run in runs]
            outputs = tuple(
                None if one[0] is None else torch.stack(one) for one in zip(*each, strict=True)
            )
        return outputs, tuple(None if one is None else 0 for one in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "rnngrad.nn layers have no double backward (create_graph=True); run the layer's "
                "cell through rnngrad.nn.unroll, which has"
            )
        if any(g is not None and _is_batched(g) for g in grads):
            raise NotImplementedError(
                "rnngrad.nn layers have no backward inside torch.vmap (is_grads_batched, "
                "jacobian(vectorize=True), vmap(grad)); run the layer's cell through "
                "rnngrad.nn.unroll, or put vmap inside and backward() outside"
            )
        call: bptt.Call | None = ctx.call
        record = call is not None and call.enter_backward()
        x, w_ih, w_hh, b_ih, b_hh, w_hr, *saved = ctx.saved_tensors
        w = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
        *_, x_needs, h_needs, c_needs, ih, hh, b_ih_needs, b_hh_needs, hr, _ = ctx.needs_input_grad
        wanted = Wanted(
            x=x_needs,
            ih=ih or b_ih_needs or b_hh_needs,
            hh=hh,
            hr=hr,
            norms=record,
            full=record and call.full,  # type: ignore[union-attr]
            weight=record and call.weight,  # type: ignore[union-attr]
        )
        backward = ctx.kernel.backward
        if ctx.segments > 1:
            backward = partial(_backward_in_segments, ctx.kernel, ctx.segments)
        back = backward(ctx.walk, x, w, tuple(saved), Incoming(*grads[:3]), wanted, ctx.clip)
        if record and back.recording is not None:
            recording = _weighed(back.recording, wanted.full)
            if ctx.clip is not None and ctx.clip.site == "carry" and not (h_needs or c_needs):
                ctx.walk.clear_first(recording.clipped)  # nobody gets what is clipped there
            call.fill(recording)  # type: ignore[union-attr]
        return (
            *(None,) * 6,
            back.x,
            back.h_0 if h_needs else None,
            back.c_0 if c_needs else None,
            back.ih if ih else None,
            back.hh,
            back.b_ih if b_ih_needs else None,
            back.b_hh if b_hh_needs else None,
            back.hr,
            None,
        )


def _is_batched(tensor: Tensor) -> bool:
    kinds = torch._C._functorch
    return kinds.is_legacy_batchedtensor(tensor) or kinds.is_functorch_wrapped_tensor(tensor)


def _forward_in_segments(
    kernel: Kernel, count: int, walk: Walk, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights
) -> Passed:
    """One part of the sequence after the other, of each of which only the first state is saved."""
    output: Tensor | None = None
    h, c, first = h_0, c_0, []
    for part in walk.parts(count):
        # aliases: autograd does not save an input that is an output as well
        first += [h.detach()] if c is None else [h.detach(), c.detach()]
        passed = kernel.forward(part.walk, part.of(x), h, c, w, keep=False)
        if output is None:
            output = x.new_empty(*x.shape[:-1], h_0.shape[-1])
        part.of(output).copy_(passed.output)
        h, c = passed.h_n, passed.c_n
    assert output is not None
    return Passed(output, h, c, tuple(first))


def _backward_in_segments(
    kernel: Kernel,
    count: int,
    walk: Walk,
    x: Tensor,
    w: Weights,
    first: tuple[Tensor, ...],
    incoming: Incoming,
    wanted: Wanted,
    clip: RowClip | None,
) -> Gradients:
    """Each part once more forward, now saving, and then back; the last part first.

    Chen, Xu, Zhang & Guestrin, "Training deep nets with sublinear memory cost", 2016, section 3.
    """
    grad_x = torch.empty_like(x) if wanted.x else None
    sums: dict[str, Tensor] = {}
    recordings: list[Recording] = []
    total: Total | None = None
    back: Gradients | None = None
    ways = (kernel, count, walk, x, w, first, incoming)
    for part, back in _parts_back(*ways, wanted, clip):
        if grad_x is not None and back.x is not None:
            part.of(grad_x).copy_(back.x)
        for name in ("ih", "hh", "b_ih", "b_hh", "hr"):
            if (grad := getattr(back, name)) is not None:
                sums[name] = sums[name].add_(grad) if name in sums else grad.clone()
        if (recording := back.recording) is None:
            continue
        if recording.contribution is not None and not wanted.full:
            found = recording.contribution.total()
            total = found if total is None else total.plus(found)
            norm = recording.contribution.norms().squeeze(-1)
            recording = recording._replace(weight_norm=norm, contribution=None)
        recordings.append(recording)
    assert back is not None
    joined = _joined(recordings, walk.reverse) if recordings else None
    if joined is not None and total is not None:
        # what all steps add up to is known only now: once more, as nothing of this size was kept
        alone = Wanted(**dict.fromkeys(Wanted._fields, False) | {"norms": True, "weight": True})
        shares = [
            again.recording.contribution.shares(total)
            for _, again in _parts_back(*ways, alone, clip)
            if again.recording is not None and again.recording.contribution is not None
        ]
        joined = joined._replace(attribution=torch.cat(shares if walk.reverse else shares[::-1]))
    return Gradients(
        x=grad_x,
        h_0=back.h_0,
        c_0=back.c_0,
        ih=sums.get("ih"),
        hh=sums.get("hh"),
        b_ih=sums.get("b_ih"),
        b_hh=sums.get("b_hh"),
        hr=sums.get("hr"),
        recording=joined,
    )


def _parts_back(
    kernel: Kernel,
    count: int,
    walk: Walk,
    x: Tensor,
    w: Weights,
    first: tuple[Tensor, ...],
    incoming: Incoming,
    wanted: Wanted,
    clip: RowClip | None,
) -> Iterator[tuple[Part, Gradients]]:
    """One part after the other, the last one first."""
    parts = walk.parts(count)
    has_cell = len(first) == 2 * len(parts)
    carried_h = carried_c = None
    for index, part in reversed(list(enumerate(parts))):
        h_0, c_0 = first[2 * index : 2 * index + 2] if has_cell else (first[index], None)
        again = kernel.forward(part.walk, part.of(x), h_0, c_0, w, keep=True)
        back = kernel.backward(
            part.walk,
            part.of(x),
            w,
            again.saved,
            Incoming(
                None if incoming.output is None else part.of(incoming.output),
                part.ending(incoming.h_n),
                part.ending(incoming.c_n),
                carried_h,
                carried_c,
            ),
            wanted,
            clip,
        )
        carried_h, carried_c = back.h_0, back.c_0
        yield part, back


def _weighed(recording: Recording, full: bool) -> Recording:
    """The recording of a whole sequence with what its contributions say, if it has them.

    Args:
        recording: As a kernel gives it.
        full: Whether to keep them.
    """
    found = recording.contribution
    if found is None:
        return recording
    return recording._replace(
        weight_norm=found.norms().squeeze(-1),
        attribution=found.attribution(),
        contribution=found if full else None,
    )


def _joined(recordings: list[Recording], in_order: bool) -> Recording:
    """Recordings of successive parts as one.

    Args:
        recordings: The last visited part first.
        in_order: Whether that is the order of time as well.
    """
    ordered = recordings if in_order else recordings[::-1]
    joined: dict[str, Any] = {}
    for name, axis in _TIME_AXES.items():
        values = [getattr(recording, name) for recording in ordered]
        joined[name] = None if values[0] is None else torch.cat(values, axis)
    contributions = [recording.contribution for recording in ordered]
    if isinstance(contributions[0], OuterProducts):
        joined["contribution"] = OuterProducts.joined(cast(Any, contributions))
    return Recording(**joined)


_TIME_AXES = {
    "hidden_norm": -2,
    "direct_norm": -2,
    "cell_norm": -2,
    "hidden_grad": -3,
    "cell_grad": -3,
    "clipped": -2,
    "weight_norm": -1,
}
