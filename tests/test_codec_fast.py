"""The fast forms of the codec's training step against the encodec package's own modules."""

from itertools import chain

import pytest
import torch
from torch.nn import functional as F

from configs.codec_schema import CodecConfig
from model.captured import WARM_UP, Captured
from model.codec import Codec, build_discriminator, initialise_weights, run_layers
from model.codec_fast import FastLayers
from model.codec_training import CodecTraining
from model.discriminator import Discriminator, verdict
from model.optim import set_learning_rate

SMALL = {"encoder_filters": 4, "decoder_filters": 4, "dimension": 8, "num_codebooks": 3}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_residual_layers", "ratios"), [(1, (8, 5, 4, 2)), (3, (5, 3))])
def test_fast_layers_are_the_packages(causal, num_residual_layers, ratios):
    torch.manual_seed(0)
    shape = {"causal": causal, "num_residual_layers": num_residual_layers, "ratios": ratios}
    codec = Codec(CodecConfig(**SMALL, **shape), weight_norm=True)
    initialise_weights(codec)
    fast, weights = FastLayers(compile=False), torch.rand(2, 1, 9 * codec.hop_length)
    wav = 0.1 * torch.randn_like(weights)
    results = []
    for run in (run_layers, fast):
        latent = codec.encode_latent(wav, run)
        decoded = codec.decode_latent(latent, run)
        codec.zero_grad()
        (decoded * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in codec.named_parameters() if p.grad is not None}
        results.append((latent, decoded, gradients))
    (latent, decoded, gradients), (fast_latent, fast_decoded, fast_gradients) = results
    assert latent.shape == (2, 8, 9)
    torch.testing.assert_close(fast_latent, latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_decoded, decoded, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        error = (fast_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-3, name


def test_the_discriminator_is_the_packages_and_its_losses_are_encodecs():
    torch.manual_seed(0)
    ours = Discriminator((256, 128), filters=4)
    package = build_discriminator((256, 128), filters=4)
    package.load_state_dict(ours.state_dict())
    real, fake = torch.randn(2, 2, 1, 2000).unbind()
    fake.requires_grad_()
    with torch.no_grad():
        (real_logits, real_maps), (fake_logits, fake_maps) = package(real), package(fake)
        spectrum = torch.view_as_real(ours.discriminators[1].spec_transform(real[:, 0]))
        logits, maps = verdict(ours.discriminators[1], spectrum.permute(0, 3, 2, 1))
    torch.testing.assert_close(logits, real_logits[1], rtol=1e-4, atol=1e-4)
    assert len(maps) == len(real_maps[1])
    for mine, theirs in zip(maps, real_maps[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    hinge = [
        F.relu(1 - x).mean() + F.relu(1 + y).mean()
        for x, y in zip(real_logits, fake_logits, strict=True)
    ]
    pairs = zip(chain(*fake_maps), chain(*real_maps), strict=True)
    feature = [(x - y).abs().mean() / y.abs().mean() for x, y in pairs]
    adversarial = torch.stack([F.relu(1 - y).mean() for y in fake_logits]).mean()
    learnt = ours(real, fake, learn=True)["discriminator"]
    told = ours(real, fake, learn=False)
    torch.testing.assert_close(learnt, torch.stack(hinge).mean())
    torch.testing.assert_close(told["adversarial"], adversarial)
    torch.testing.assert_close(told["feature"], torch.stack(feature).mean())
    learnt.backward()
    assert fake.grad is None  # what it learns from does not move the codec
    told["feature"].backward()
    assert fake.grad.abs().sum() > 0


def test_a_compiled_quantiser_follows_the_latents_as_the_plain_one_does():
    """Compiled together with its update, the search once read codebooks that were already new."""
    torch.manual_seed(0)
    plain, compiled = (
        CodecTraining(Codec(CodecConfig(**SMALL, codebook_size=16)), 0.9, 0.1, compile=compile)
        for compile in (False, True)
    )
    for layer in plain.layers:
        book = layer._codebook
        book.embed.normal_()
        book.cluster_size.fill_(2.0)
        book.embed_avg.copy_(2 * book.embed)
    compiled.load_state_dict(plain.state_dict())
    counts, restarts = torch.tensor([3, 2]), torch.randint(0, 2**31, (3, 16))
    for _ in range(3):
        latent = torch.randn(2, 8, 20)
        wanted = plain.quantize(latent, counts, restarts)
        for mine, theirs in zip(compiled.quantize(latent, counts, restarts), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(compiled.state_dict()[name], value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_are_the_plain_steps():
    def make(captured: bool):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4, device="cuda")
        rate = torch.tensor(0.1, device="cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), rate, fused=True, capturable=True)

        def step(square: bool, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = layer(x)
            loss = y.square().mean() if square else y.abs().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss.detach()}

        return Captured(step) if captured else step, optimizer, layer

    plain, captured = make(False), make(True)
    for i in range(4 * WARM_UP):
        x, losses = torch.randn(3, 4, device="cuda"), []
        for step, optimizer, _ in (plain, captured):
            set_learning_rate(optimizer, 0.1 * 0.5**i)
            losses.append(step(i % 2 == 0, x=x)["loss"])
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(plain[2].weight, captured[2].weight)


def test_a_rate_in_a_tensor_stays_where_it_is():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), rate)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
