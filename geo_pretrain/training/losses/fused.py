"""Contrast between many rows, a block of scores at a time: no matrix of all scores is kept, in either direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of a block: those of 1024 rows stay in a processor's cache; a GPU is kept busy by more.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}
COLDEST = 1 / 30  # down to this temperature exp(cosine / temperature) of any two rows can be summed in float32


class Settings(NamedTuple):
    """What the scores of a block depend on, beside the rows."""

    temperature: float
    symmetric: bool
    bound: float | None  # no score is larger than it or smaller than -it; None: not known


def info_nce_of_rows(
    query: Tensor, key: Tensor, ignore: Tensor | None, temperature: float, symmetric: bool, bound: float | None
) -> Tensor:
    """`contrastive.info_nce` of query, key [B, N, C] as they are, and ignore bool [B, N, N] or None: [B].

    `bound`: no score is larger than it or smaller than -it, which saves a search for the largest; None: not known.

    >>> rows = torch.eye(2)[None]
    >>> info_nce_of_rows(rows, rows, None, 1.0, True, 1.0).round(decimals=4)  # log(1 + exp(-1))
    tensor([0.3133])
    """
    loss: Tensor = _InfoNCE.apply(query, key, ignore, Settings(temperature, symmetric, bound))
    return loss


class _InfoNCE(torch.autograd.Function):
    """Forward keeps the logarithms of sums; backward computes scores again: a small product where rows are narrow."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, ignore: Tensor | None, settings: Settings) -> Tensor:
        shape = query.shape[:2]
        positive, by_row = query.new_empty(shape), query.new_empty(shape)
        by_column = query.new_full(shape, -torch.inf) if settings.symmetric else None
        for some, part, own, scores in _scores(query, key, ignore, settings):
            positive[some, part] = own
            if settings.bound is None:
                by_row[some, part] = scores.logsumexp(-1)
                columns = scores.logsumexp(-2) if by_column is not None else None
            else:
                scores.exp_()
                by_row[some, part] = scores.sum(-1).log_().add_(settings.bound)
                columns = scores.sum(-2).log_().add_(settings.bound) if by_column is not None else None
            if by_column is not None and columns is not None:
                by_column[some] = torch.logaddexp(by_column[some], columns)
        ctx.save_for_backward(query, key, ignore, by_row, by_column)
        ctx.settings = settings
        loss = (by_row - positive).mean(-1)
        return loss if by_column is None else (loss + (by_column - positive).mean(-1)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, ignore, by_row, by_column = ctx.saved_tensors
        settings: Settings = ctx.settings
        if settings.bound is not None:  # a score's share of its row's sum is exp(score - bound) times this
            by_row = (settings.bound - by_row).exp_()[..., None]
            by_column = None if by_column is None else (settings.bound - by_column).exp_()[..., None]
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        for some, part, _, scores in _scores(query, key, ignore, settings):
            rows, columns = query[some, part], key[some]
            if settings.bound is None:
                shares = _shares(scores, by_row[some, part], None if by_column is None else by_column[some])
                grad_query[some, part] = shares @ columns
                grad_key[some] += shares.mT @ rows
                continue
            scores.exp_()
            if by_column is None:
                grad_query[some, part] = by_row[some, part] * (scores @ columns)
                grad_key[some] += scores.mT @ (by_row[some, part] * rows)
            else:
                grad_query[some, part] = _weighted(scores, columns, by_row[some, part], by_column[some])
                grad_key[some] += _weighted(scores.mT, rows, by_column[some], by_row[some, part])
        scale = (grad / (query.shape[1] * settings.temperature))[:, None, None]
        share = 0.5 if settings.symmetric else 1.0
        return (grad_query * share - key) * scale, (grad_key * share - query) * scale, None, None


def _weighted(scores: Tensor, columns: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """(by_row * scores + scores * by_column) @ columns for weights [b, n, 1] and [b, N, 1], by one product."""
    by_rows, by_columns = (scores @ torch.cat((columns, by_column * columns), -1)).chunk(2, -1)
    return (by_row * by_rows).add_(by_columns)


def _shares(scores: Tensor, by_row: Tensor, by_column: Tensor | None) -> Tensor:
    """The shares of scores in the sums of their rows, plus those in their columns' where they are given."""
    shares = (scores - by_row[..., None]).exp_()
    return shares if by_column is None else shares.add_(scores.sub_(by_column[:, None]).exp_())


def _scores(
    query: Tensor, key: Tensor, ignore: Tensor | None, settings: Settings
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """For each block: its problems and rows, their own scores [b, n], and all scores [b, n, N], less the bound."""
    count, rows, _ = query.shape
    limit = BLOCK.get(query.device.type, BLOCK["cpu"])
    problems, height = max(limit // max(rows * rows, 1), 1), min(max(limit // max(rows, 1), 1), rows)
    for first in range(0, count, problems):
        some = slice(first, first + problems)
        for top in range(0, rows, height):
            part = slice(top, top + height)
            scores = torch.bmm(query[some, part] / settings.temperature, key[some].mT)
            own = scores.diagonal(top, 1, 2).clone()
            if settings.bound is not None:
                scores -= settings.bound
            if ignore is not None:
                kept = scores.diagonal(top, 1, 2).clone()
                scores.masked_fill_(ignore[some, part], -torch.inf)
                scores.diagonal(top, 1, 2).copy_(kept)  # a positive is never ignored
            yield some, part, own, scores


def log_sums(rows: Tensor, columns: Tensor, temperature: float, *, own: bool = True) -> Tensor:
    """The logarithm of each row's sum of exp(score / temperature) over the columns [N, C]: [N].

    `own`: whether row i is compared with column i.

    >>> rows = torch.eye(2)
    >>> log_sums(rows, rows, 1.0, own=False)
    tensor([0., 0.])
    """
    sums: Tensor = _LogSums.apply(rows, columns, temperature, own)
    return sums


class _LogSums(torch.autograd.Function):
    """Forward keeps the sums alone; backward computes scores again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, temperature: float, own: bool) -> Tensor:
        sums = rows.new_empty(len(rows))
        for part in _blocks(rows):
            sums[part] = _with_all(rows, columns, part, temperature, own).logsumexp(-1)
        ctx.save_for_backward(rows, columns, sums)
        ctx.settings = temperature, own
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns, sums = ctx.saved_tensors
        temperature, own = ctx.settings
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for part in _blocks(rows):
            scores, total = _with_all(rows, columns, part, temperature, own), sums[part, None]
            shares = scores.sub_(total).exp_().masked_fill_(total == -torch.inf, 0)  # a row that meets no column
            shares.mul_((grad[part] / temperature)[:, None])
            grad_rows[part] = shares @ columns
            grad_columns += shares.T @ rows[part]
        return grad_rows, grad_columns, None, None


def _with_all(rows: Tensor, columns: Tensor, part: slice, temperature: float, own: bool) -> Tensor:
    """Scores [n, N] of some rows with all columns."""
    scores = (rows[part] / temperature) @ columns.T
    if not own:
        scores.diagonal(part.start).fill_(-torch.inf)
    return scores


Parts = Callable[[slice], Tensor]  # rows -> uint8 [n, N]: the part of each column around each row, `count` for none


def partition_nce_of_rows(query: Tensor, key: Tensor, parts: Parts, count: int, temperature: float) -> Tensor:
    """`contrastive.partition_info_nce` of query, key [N, C] and `count` parts: a scalar.

    >>> rows = torch.eye(2)
    >>> loss = partition_nce_of_rows(rows, rows, lambda some: rows[some].byte(), 1, 1.0)
    >>> loss.round(decimals=4)  # log(1 + exp(-1)): the other row is the one part's only negative
    tensor(0.3133)
    """
    loss: Tensor = _PartitionNCE.apply(query, key, parts, count, temperature)
    return loss


class _PartitionNCE(torch.autograd.Function):
    """Forward keeps a number for each row and part, and the parts in a byte each; backward computes scores again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, parts: Parts, count: int, temperature: float) -> Tensor:
        sums = query.new_zeros(len(query), count + 1)  # the last: of no part
        kept = []
        for rows in _blocks(query):
            kept.append(parts(rows))
            sums[rows] = sums[rows].scatter_add(1, kept[-1].long(), _ratios(query, key, rows, temperature))
        sums = sums[:, :count].contiguous()
        ctx.save_for_backward(query, key, sums, *kept)
        ctx.temperature = temperature
        return sums.log1p().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, key, sums, *kept = ctx.saved_tensors
        # What a ratio of each part adds to the loss; a last column of zeros for the ratios of no part.
        weights = torch.nn.functional.pad(grad / (ctx.temperature * sums.numel()) / (1 + sums), (0, 1))
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for rows, part in zip(_blocks(query), kept, strict=True):
            shares = _ratios(query, key, rows, ctx.temperature) * weights[rows].gather(1, part.long())
            own = shares.sum(-1, keepdim=True)
            grad_query[rows] = shares @ key - own * key[rows]
            grad_key += shares.T @ query[rows]
            grad_key[rows] -= own * query[rows]
        return grad_query, grad_key, None, None, None


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Cut rows [N, C] so that the scores of a block [n, N] stay within `BLOCK`."""
    height = max(BLOCK.get(rows.device.type, BLOCK["cpu"]) // max(len(rows), 1), 1)
    return (slice(top, min(top + height, len(rows))) for top in range(0, len(rows), height))


def _ratios(query: Tensor, key: Tensor, rows: slice, temperature: float) -> Tensor:
    """exp(score - own score) [n, N] of some rows with all columns."""
    scores = _with_all(query, key, rows, temperature, own=True)
    own = scores.diagonal(rows.start).clone()
    return scores.sub_(own[:, None]).exp_()
