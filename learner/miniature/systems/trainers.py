"""Training functions of networks, to be bound to their sizes: (job, sizes) -> the network's file.

Text-image networks have theirs in `text_image`.
"""

from __future__ import annotations

from actors.checkpoints.loading import TokenizerConfig, init_policy, load_tokenizer
from actors.models.base import PolicyArchitecture
from actors.models.vq import VQConfig, VQTokenizer
from learner.miniature import training
from learner.miniature.systems.system import Job
from rewards.networks.convnet import ConvNetConfig


def tokenizer(job: Job, config: VQConfig, objective: training.TokenizerLoss) -> None:
    """A VQ autoencoder."""
    batches = job.batches()
    network = training.train_tokenizer(batches, config, job.steps, job.tick, objective)
    job.write(network, config.to_dict())


def policy(job: Job, architecture: PolicyArchitecture, tokenizer: str) -> None:
    """A policy of the data's conditions, on the tokens of the tokenizer in the file `tokenizer`."""
    encoder, batches = read_tokenizer(job, tokenizer), job.batches()
    network = init_policy(architecture)
    training.train_policy(batches, encoder, network, job.steps, job.tick)
    job.write(network, architecture.to_dict())


def classifier(job: Job, config: ConvNetConfig) -> None:
    """A classifier of the data's conditions: features, or a judge."""
    network = training.train_classifier(job.batches(), config, job.steps, job.tick)
    job.write(network, config.to_dict())


def autoencoder(job: Job, config: ConvNetConfig) -> None:
    """A network that was never told the conditions: features of a further space."""
    network = training.train_autoencoder(job.batches(), config, job.steps, job.tick)
    job.write(network, config.to_dict())


def read_tokenizer(job: Job, file: str) -> VQTokenizer:
    """A tokenizer that was built before, frozen."""
    return load_tokenizer(TokenizerConfig(checkpoint=str(job.folder / file)))
