"""Losses of the policy's own log-probs, without a reference: pure functions of tensors.

    pi_c, pi_r     (P,) summed log-probs of chosen and rejected completion, nats
    len_c, len_r   (P,) their lengths in tokens
    mean_len_c     mean of len_c over the pairs of the global batch

The negative log-likelihood (NLL) of `sft`, `orpo` and `cpo` is a mean over the chosen tokens of the global batch, as a
mean over pairs: each pair's summed NLL is divided by the mean length. TRL takes the token mean within a micro-batch;
with one micro-batch on one rank the two are the same number, with several ours does not depend on how pairs are spread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.objective.losses import sigmoid


def sft(chosen_logps: Tensor, mean_chosen_length: float) -> Tensor:
    """Supervised fine-tuning on the chosen completion, to be summed with a preference loss (RPO is sigmoid + sft).

    loss = -pi_c / mean_len_c

    Args:
        chosen_logps: (P,) pi_c.
        mean_chosen_length: mean_len_c, tokens.
    Source:
        The NLL term of RPO: Pang et al. 2024, arXiv:2404.19733, there averaged within each completion
    """
    return -chosen_logps / mean_chosen_length


def simpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float,
    gamma: float = 0.5,
) -> Tensor:  # fmt: skip
    """SimPO: log-probs per token, and a target margin; gamma is loss.simpo_gamma. beta 2 to 10 in the paper.

    loss = -logsigmoid(beta (pi_c / len_c - pi_r / len_r) - gamma)

    Source:
        Meng et al. 2024, arXiv:2405.14734, Eq. 6
    """
    return -logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma)


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), (P,); a p that rounds to 1 has the largest odds there are, and their
    gradient."""
    largest = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    mean_logps = mean_logps + (largest - mean_logps).detach()
    # log(1 - exp(x)), accurate on both sides of x = -log 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))").
    small = mean_logps > -0.6931
    near_zero = torch.log(-torch.expm1(torch.where(small, mean_logps, torch.full_like(mean_logps, -0.5))))
    far = torch.log1p(-torch.exp(torch.where(small, torch.full_like(mean_logps, -1.0), mean_logps)))
    return mean_logps - torch.where(small, near_zero, far)


def orpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    mean_chosen_length: float, beta: float,
) -> Tensor:  # fmt: skip
    """ORPO: NLL and the log odds ratio of mean token probabilities; beta is the paper's lambda.

    loss = -pi_c / mean_len_c - beta logsigmoid(log odds(p_c) - log odds(p_r)),  p = exp(pi / len)

    The NLL is of the completion; the authors' and TRL's code add the prompt's.

    Source:
        Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7
    """
    ratio = log_odds(chosen_logps / chosen_lengths) - log_odds(rejected_logps / rejected_lengths)
    return sft(chosen_logps, mean_chosen_length) - beta * logsigmoid(ratio)


def cpo(
    chosen_logps: Tensor, rejected_logps: Tensor, mean_chosen_length: float, beta: float, label_smoothing: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:  # fmt: skip
    """CPO: DPO with a uniform reference, and NLL; alpha is loss.cpo_alpha, eps label smoothing as in `sigmoid`.

    loss = -(1 - eps) logsigmoid(beta d) - eps logsigmoid(-beta d) - alpha pi_c / mean_len_c,  d = pi_c - pi_r

    Source:
        Xu et al. 2024, arXiv:2401.08417; NLL per token as in the authors' code
    """
    preference = sigmoid(chosen_logps, rejected_logps, beta, label_smoothing)
    return preference + alpha * sft(chosen_logps, mean_chosen_length)
