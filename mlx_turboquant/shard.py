"""Which share of a model this process holds, in words, in a fingerprint and in a file's name."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

_TEXT = re.compile(r"\.pipeline(\d+)of(\d+)|\.tensor(\d+)of(\d+)")


class Shard(NamedTuple):
    """Place and number of the processes that hold one model together; the default is all of it in one process.

    Attributes:
        pipeline, pipelines: rank and size of the group among which `model.pipeline` divided the layers.
        tensor, tensors: rank and size of the group among which `model.shard` divided every layer's heads.
    """

    pipeline: int = 0
    pipelines: int = 1
    tensor: int = 0
    tensors: int = 1

    @property
    def rank(self) -> int:
        """This process among all that hold a part: its tensor rank, counted through the pipeline's stages."""
        return self.pipeline * self.tensors + self.tensor

    @property
    def size(self) -> int:
        """How many processes hold a part."""
        return self.pipelines * self.tensors

    @property
    def text(self) -> str:
        """What a fingerprint ends with, ``.pipeline1of2.tensor0of2`` for instance; "" for a whole model."""
        pipeline = f".pipeline{self.pipeline}of{self.pipelines}" if self.pipelines > 1 else ""
        return pipeline + (f".tensor{self.tensor}of{self.tensors}" if self.tensors > 1 else "")

    def __str__(self) -> str:
        parts = [f"rank {self.pipeline} of {self.pipelines} (pipeline)"] if self.pipelines > 1 else []
        parts += [f"rank {self.tensor} of {self.tensors} (tensor parallel)"] if self.tensors > 1 else []
        return "the share of " + ", ".join(parts) if parts else "a whole model"


def shard_of(model: Any) -> Shard:
    """The share of an mlx-lm model that `mlx_lm.utils.sharded_load`, `model.shard` or `model.model.pipeline` left.

    Read from what they leave in its modules: the group of every layer that adds up over the ranks, and the stage's
    rank and size. A group of one process is no sharding.
    """
    shard = Shard()
    for module in model.modules():
        held = vars(module)
        if held.get("pipeline_size", 1) > 1:
            shard = shard._replace(pipeline=held["pipeline_rank"], pipelines=held["pipeline_size"])
        for value in held.values():
            if isinstance(value, mx.distributed.Group) and value.size() > 1:
                shard = shard._replace(tensor=value.rank(), tensors=value.size())
    return shard


def shard_in(fingerprint: str) -> Shard:
    """The share that a fingerprint's text names."""
    shard = Shard()
    for pipeline, pipelines, tensor, tensors in _TEXT.findall(fingerprint):
        if pipelines:
            shard = shard._replace(pipeline=int(pipeline), pipelines=int(pipelines))
        else:
            shard = shard._replace(tensor=int(tensor), tensors=int(tensors))
    return shard


def rank_path(path: Path, rank: int, size: int) -> Path:
    """The file of one rank: ``notes.rank0of2.safetensors`` for ``notes.safetensors``; the path itself if size is 1."""
    mark = f".rank{rank}of{size}"
    return path if size == 1 or path.stem.endswith(mark) else path.with_name(f"{path.stem}{mark}{path.suffix}")


def rank_files(path: Path) -> list[Path]:
    """The files of ranks, of any size, that lie beside a path of this name."""
    wanted = re.compile(re.escape(path.stem) + r"\.rank\d+of\d+" + re.escape(path.suffix))
    return sorted(other for other in path.parent.glob("*" + path.suffix) if wanted.fullmatch(other.name))
