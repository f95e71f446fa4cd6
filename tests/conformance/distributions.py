"""Densities of `torch.distributions`, with their default checks of arguments."""

from __future__ import annotations

import torch
from torch import distributions as dist

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()
loc = weight(4, seed=5)


@case(weights=[loc])
def normal(r):
    return dist.Normal(loc, r.exp()).log_prob(r)


@case()
def multivariate_normal(r):
    covariance = torch.outer(r, r) + torch.eye(4)
    return dist.MultivariateNormal(r, covariance).log_prob(torch.zeros(4))


@case()
def low_rank_normal(r):
    d = dist.LowRankMultivariateNormal(r, r[:, None], r.square() + 1)
    return d.log_prob(torch.ones(4))


@case()
def categorical(r):
    d = dist.Categorical(logits=r)
    return d.log_prob(torch.tensor(2)) + d.entropy()


@case()
def categorical_of_its_own(r):
    return dist.Categorical(logits=r).log_prob(r.argmax())


@case()
def bernoulli(r):
    return dist.Bernoulli(logits=r).log_prob((r > 0.5).float())


@case(positive=True)
def beta(r):
    return dist.Beta(r, r + 1).log_prob(torch.full((4,), 0.3))


@case(positive=True)
def gamma(r):
    return dist.Gamma(r, 2.0).log_prob(r + 1)


@case(positive=True)
def dirichlet(r):
    return dist.Dirichlet(r).log_prob(r / r.sum())


@case(positive=True)
def exponential_and_poisson(r):
    return dist.Exponential(r).log_prob(r) + dist.Poisson(r).log_prob(torch.tensor(2.0))


@case(positive=True)
def student_t(r):
    return dist.StudentT(r + 2, r, r).log_prob(torch.zeros(4))


@case(positive=True)
def laplace_and_cauchy(r):
    return dist.Laplace(r, r).log_prob(r * 2) + dist.Cauchy(0.0, r).log_prob(r)


@case(positive=True)
def log_normal(r):
    return dist.LogNormal(r, 0.5).log_prob(r)


@case()
def a_uniform_with_its_own_bounds(r):
    return dist.Uniform(r - 1, r + 1).log_prob(r + 0.1)


@case()
def kl_of_normals(r):
    return dist.kl_divergence(dist.Normal(r, 1.0), dist.Normal(0.0, r.exp()))


@case(positive=True)
def kl_of_gammas(r):
    return dist.kl_divergence(dist.Gamma(r, r), dist.Gamma(2.0, 1.0))


@case()
def kl_of_categoricals(r):
    return dist.kl_divergence(dist.Categorical(logits=r), dist.Categorical(logits=r.flip(0)))


@case(positive=True)
def entropies(r):
    return dist.Gamma(r, 1.0).entropy() + dist.Beta(r, r).entropy() + dist.Normal(r, r).entropy()


@case(positive=True)
def independent(r):
    return dist.Independent(dist.Normal(r, r), 1).log_prob(torch.zeros(4))


@case()
def a_mixture(r):
    mix = dist.Categorical(logits=r)
    return dist.MixtureSameFamily(mix, dist.Normal(r, 1.0)).log_prob(torch.tensor(0.5))


@case()
def transformed(r):
    d = dist.TransformedDistribution(
        dist.Normal(torch.zeros(4), 1.0), [dist.transforms.AffineTransform(r, r.exp())]
    )
    return d.log_prob(torch.ones(4))


@case(positive=True)
def cdf_and_icdf(r):
    d = dist.Normal(r, r)
    return d.cdf(torch.ones(4)) + d.icdf(torch.full((4,), 0.3))


@case(positive=True)
def half_normal_and_gumbel(r):
    return dist.HalfNormal(r).log_prob(r) + dist.Gumbel(r, 1.0).log_prob(r * 2)


@case()
def multinomial(r):
    return dist.Multinomial(3, logits=r).log_prob(torch.tensor([1.0, 0.0, 2.0, 0.0]))


@case(positive=True)
def binomial_and_geometric(r):
    p = r / 3
    return dist.Binomial(4, p).log_prob(torch.tensor(2.0)) + dist.Geometric(p).log_prob(
        torch.tensor(1.0)
    )


@case()
def von_mises(r):
    return dist.VonMises(r, torch.tensor(1.5)).log_prob(torch.tensor(0.3))


@case()
def moments(r):
    d = dist.Categorical(logits=r)
    return dist.Normal(r, r.exp()).variance + d.probs


@case()
def a_wishart_density(r):
    m = torch.outer(r, r) + 2 * torch.eye(4)
    return dist.Wishart(torch.tensor(5.0), torch.eye(4)).log_prob(m)
