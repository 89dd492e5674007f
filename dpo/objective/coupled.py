"""Losses that couple the pairs of a global batch, each in two parts: pure functions of tensors.

    partners(log-probs of the whole global batch, without gradient) -> (B, k): what the other pairs give to each pair
    loss(log-probs of some pairs, their partners) -> (P,) losses of these pairs alone

So the global batch is scored once without gradient, and the backward passes then run per micro-batch against fixed
partners: the gradient is that of the sum over the global batch, however pairs are spread over ranks and micro-batches.

Legend: B pairs of the global batch, P pairs of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.objective.losses import sigmoid

SMALLEST_BETA = 1e-3
"""Of beta_dpo, as in the authors' code: a beta of 0 or below would reward the rejected completion."""


def _partner(mine: Tensor, others: Tensor) -> Tensor:
    """(B,) of `others`, in the order that gives the k-th smallest of `mine` the k-th smallest of `others`."""
    order = mine.argsort(stable=True)
    result = torch.empty_like(others)
    result[order] = others.sort(stable=True).values
    return result


def aot_partners(policy_gaps: Tensor, reference_gaps: Tensor) -> Tensor:
    """What `aot` compares each pair with.

    Args:
        policy_gaps: (B,) log-prob of chosen minus rejected under the policy, nats.
        reference_gaps: (B,) under the reference.
    Returns:
        (B, 1): the reference gap of the same rank.
    """
    return _partner(policy_gaps, reference_gaps)[:, None]


def aot(policy_gaps: Tensor, partners: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT: the policy's gaps should dominate the reference's as distributions, each rank compared with the same rank.

    loss = -(1 - eps) logsigmoid(beta d) - eps logsigmoid(-beta d),  d = sort(pi_c - pi_r) - sort(ref_c - ref_r)

    Args:
        policy_gaps: (P,) pi_c - pi_r, with gradient.
        partners: (P, 1) of `aot_partners`, over the global batch.

    Source:
        Melnyk et al. 2024, arXiv:2406.05882 (paired)
    """
    return sigmoid(policy_gaps, partners[:, 0], beta, label_smoothing)


def aot_unpaired_partners(chosen: Tensor, rejected: Tensor) -> Tensor:
    """What `aot_unpaired` compares each completion with.

    Args:
        chosen, rejected: (B,) log-ratios.
    Returns:
        (B, 2): the rejected log-ratio of the chosen one's rank, the chosen log-ratio of the rejected one's rank.
    """
    return torch.stack((_partner(chosen, rejected), _partner(rejected, chosen)), dim=1)


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, partners: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT without pairs: chosen log-ratios should dominate rejected ones, each rank compared with the same rank.

    loss = -(1 - eps) logsigmoid(beta d) - eps logsigmoid(-beta d),  d = sort(c) - sort(r)

    Each d has a chosen and a rejected completion, mostly of different pairs. Its value is counted with the chosen one,
    its gradient with respect to either with the pair that holds it.

    Args:
        chosen, rejected: (P,) log-ratios, with gradient.
        partners: (P, 2) of `aot_unpaired_partners`, over the global batch.

    Source:
        Melnyk et al. 2024, arXiv:2406.05882 (unpaired)
    """
    of_chosen = sigmoid(chosen, partners[:, 0], beta, label_smoothing)
    of_rejected = sigmoid(partners[:, 1], rejected, beta, label_smoothing)
    return of_chosen + of_rejected - of_rejected.detach()


def moving_mean(before: float, gaps: Tensor, momentum: float) -> float:
    """beta_dpo's running mean of log-ratio gaps, 0 before the first step: m M + (1 - m) mean(gaps)."""
    return momentum * before + (1 - momentum) * float(gaps.mean())


def beta_dpo_partners(gaps: Tensor, running: float, beta: float, alpha: float) -> Tensor:
    """The beta of a global batch.

    beta_batch = max(1e-3, beta (1 + alpha (mean(delta) - M)))

    Args:
        gaps: (B,) delta of every pair.
        running: M, with this batch already in it, as in the authors' code.
        beta, alpha: loss.beta and loss.beta_dpo_alpha.
    Returns:
        (B, 1): the same beta for every pair.
    """
    value = beta * (1 + alpha * (gaps.mean() - running))
    return value.clamp(min=SMALLEST_BETA).expand(len(gaps), 1)


def beta_dpo(chosen: Tensor, rejected: Tensor, partners: Tensor) -> Tensor:
    """beta-DPO: a beta for every batch, larger where its pairs are told apart more easily than usual.

    loss = -logsigmoid(beta_batch delta),  beta_batch = max(1e-3, beta (1 + alpha (mean(delta) - M)))

    M is the running mean of delta, with momentum loss.beta_dpo_momentum, kept in checkpoints; alpha is
    loss.beta_dpo_alpha. Every pair is kept: the paper's filter, which drops a share of the pairs, is left out.

    Args:
        chosen, rejected: (P,) log-ratios, with gradient.
        partners: (P, 1) of `beta_dpo_partners`.

    Source:
        Wu et al. 2024, arXiv:2407.08639
    """
    return sigmoid(chosen, rejected, partners[:, 0])
