"""A run's settings and its end, as TensorBoard's table of runs takes them.

Written into the run's own event file: ``SummaryWriter.add_hparams`` makes a second run beside it,
and hides the keys that the first run of a sweep has not. No summary of the whole experiment is
written, so that TensorBoard takes the union of all keys by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb

Value = str | bool | int | float


def session_start(settings: Mapping[str, Any]) -> Summary:
    """A run's settings but for its seed; runs equal in them are one line of the table.

    Args:
        settings: The configuration, nested.
    """
    flat = flatten(settings)
    flat.pop("seed", None)
    return hparams_pb(flat, trial_id=group_name(settings))


def session_end(status: str) -> Summary | None:
    """How it ended: a run that diverged or failed is a failure.

    Args:
        status: As in summary.json.

    Returns:
        ``None`` for one that was interrupted, which TensorBoard shows as not finished.
    """
    ends = {
        "completed": api_pb2.STATUS_SUCCESS,
        "diverged": api_pb2.STATUS_FAILURE,
        "failed": api_pb2.STATUS_FAILURE,
    }
    if status not in ends:
        return None
    end = plugin_data_pb2.SessionEndInfo(status=ends[status], end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    return Summary(
        value=[
            Summary.Value(
                tag=metadata.SESSION_END_INFO_TAG,
                metadata=metadata.create_summary_metadata(data),
                tensor=metadata.NULL_TENSOR,
            )
        ]
    )


def flatten(settings: Mapping[str, Any]) -> dict[str, Value]:
    """Nested settings by dotted key, with text for what TensorBoard has no type for.

    >>> flatten({"clip": {"name": "norm", "max_norm": math.inf}, "plugins": [], "device": None})
    {'clip.name': 'norm', 'clip.max_norm': 'inf', 'plugins': '[]', 'device': 'null'}
    """
    return dict(_leaves(settings, ""))


def group_name(settings: Mapping[str, Any]) -> str:
    """The name that all seeds of one configuration share.

    >>> group_name({"task": {"name": "adding"}, "cell": {"name": "gru"}, "seed": 3})
    'adding_gru-5bdd7c88'
    """
    flat = flatten(settings)
    flat.pop("seed", None)
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]
    parts = (flat.get(f"{group}.name") for group in ("task", "cell", "clip"))
    return "_".join(str(part) for part in parts if part is not None) + f"-{digest}"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Value]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        yield key, value
    elif isinstance(value, float):
        yield key, str(value)
    else:
        yield key, json.dumps(value, default=str)
