import pytest
import torch
import torch.nn.functional as F

from lightning_genseg import TokenDecoderOptions
from lightning_genseg.methods.gss.head import TokenHead


def make(logits_at_once=2**26, dropout=0.1):
    options = {"fused_channels": 8, "head_channels": 12, "dropout": dropout}
    return TokenHead(11, TokenDecoderOptions(**options, logits_at_once=logits_at_once))


def cells(size=(5, 7)):
    torch.manual_seed(0)
    features = torch.randn(2, 8, *size, requires_grad=True)
    tokens = torch.randint(11, (2, *size))
    return features, tokens, torch.rand(2, *size) < 0.7


@pytest.mark.parametrize("cells_at_once", [1, 3, 10, 49])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_in_parts_it_is_the_plain_cross_entropy(cells_at_once, precision):
    results = []
    for at_once in (None, cells_at_once):
        features, tokens, valid = cells()
        torch.manual_seed(1)
        head = make(11 * (at_once or 1000), dropout=0.5)
        assert head.cells_at_once == (at_once or 1000)
        torch.manual_seed(2)  # the same channels are dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            if at_once is None:
                logits = head(features).float()
                target = tokens.masked_fill(~valid, -100)
                loss = F.cross_entropy(logits, target, reduction="sum")
            else:
                loss, _ = head.cross_entropy(features, tokens, valid)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append([loss, features.grad, *(p.grad for p in head.parameters())])
    tolerance = {"rtol": 5e-2, "atol": 0.15} if precision == "bfloat16" else {}
    for plain, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, plain, **tolerance)


def test_no_cell_counts():
    features, tokens, valid = cells()
    head = make()
    loss, count = head.cross_entropy(features, tokens, torch.zeros_like(valid))
    loss.backward()
    assert loss == count == 0
    # Not None: distributed training would wait for them.
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_cells_that_do_not_count_get_no_logits():
    """Whatever token is asked for, also one that does not exist."""
    features, tokens, valid = cells()
    head = make().eval()
    expected = head.cross_entropy(features, tokens, valid)
    assert head.cross_entropy(features, tokens.masked_fill(~valid, 99), valid) == expected


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_likeliest_tokens(at_once):
    features = cells()[0]
    head = make(at_once).eval()
    assert torch.equal(head.predict(features), head(features).argmax(1))


@pytest.mark.parametrize(
    ("width", "given", "expected"), [(2048, None, 0.01), (128, None, 0.04), (128, 0.01, 0.01)]
)
def test_initial_deviation_goes_by_the_width(width, given, expected):
    options = {"fused_channels": 8, "head_channels": width, "initial_deviation": given}
    classifier = TokenHead(500, TokenDecoderOptions(**options)).classifier
    assert classifier.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert not classifier.bias.any()


def vocabulary_head(places):
    options = {"fused_channels": 8, "head_channels": 12, "dropout": 0.0, "vocabulary": places}
    return TokenHead(11, TokenDecoderOptions(**options))


def others_of(came):
    return [token for token in range(11) if token not in came]


def test_a_vocabulary_without_a_word_harms_no_weight():
    features, tokens, valid = cells()
    head = vocabulary_head(8)
    loss, count = head.cross_entropy(features, tokens, torch.zeros_like(valid))
    loss.backward()
    assert loss == count == 0
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert head(features).softmax(1).isfinite().all()


@pytest.mark.parametrize("at_once", [3, 2**26])
def test_a_vocabulary_gives_the_cross_entropy_over_tokens_that_came(at_once):
    features, tokens, valid = cells()
    tokens = 2 * (tokens % 5)
    head = vocabulary_head(8)
    head.cells_at_once = at_once
    loss, count = head.cross_entropy(features, tokens, valid)
    assert count == valid.sum()
    assert head.classifier.out_channels == 8
    logits = head(features)
    came = tokens[valid].unique()
    others = others_of(came)
    assert (logits > -100).all((0, 2, 3)).nonzero().flatten().tolist() == came.tolist()
    assert not logits.detach().softmax(1)[:, others_of(came)].any()
    expected = F.cross_entropy(logits, tokens.masked_fill(~valid, -100), reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    # One that comes later gets a place, and the others keep theirs.
    places = head.place_of.clone()
    tokens[0, 0, 0], valid[0, 0, 0] = others[0], True
    head.eval().cross_entropy(features, tokens, valid)
    assert torch.equal(head.place_of, places), "learned without training"
    head.train().cross_entropy(features, tokens, valid)
    assert (head.place_of != places).nonzero().flatten().tolist() == [others[0]]
    assert int(head.taken) == len(came) + 1
    again = vocabulary_head(8)
    again.load_state_dict(head.state_dict())
    for one in (head.eval(), again.eval()):
        assert torch.equal(one.predict(features), head(features).argmax(1))


def test_a_full_vocabulary_leaves_out_other_tokens():
    features, tokens, valid = cells()
    head = vocabulary_head(2)
    loss, count = head.cross_entropy(features, tokens, valid)
    first = tokens[valid].unique()[:2]
    assert head.is_full()
    assert head.token_of[:2].tolist() == first.tolist()
    known = valid & torch.isin(tokens, first)
    torch.testing.assert_close((loss, count), head.cross_entropy(features, tokens, known))
    assert count == known.sum() < valid.sum()
    assert torch.isin(head.eval().predict(features), first).all()


def test_a_vocabulary_of_all_tokens_is_none():
    assert not vocabulary_head(11).has_vocabulary
    assert vocabulary_head(11).state_dict().keys() == vocabulary_head(None).state_dict().keys()


@pytest.mark.parametrize("places", [None, 8])
def test_tokens_share_the_weights_of_the_classes_they_draw(places):
    features, tokens, valid = cells()
    tokens = tokens % 5
    options = {"fused_channels": 8, "head_channels": 12, "dropout": 0.0, "vocabulary": places}
    drawn = torch.randint(3, (11, 2, 2))
    head = TokenHead(11, TokenDecoderOptions(**options, classes="shared"), drawn, 3)
    loss, count = head.cross_entropy(features, tokens, valid)
    assert count == valid.sum()
    loss.backward()
    assert (head.class_weight.grad.abs().sum(1) > 0).any()
    own = head.classifier.weight[..., 0, 0]
    of_class = head.class_weight.view(4, 3, 12)  # pixel, class, channel
    ids = torch.arange(11) if places is None else head.token_of[:8]
    for place, token in enumerate(ids.tolist()):
        mean = sum(of_class[pixel, drawn[token].flatten()[pixel]] for pixel in range(4)) / 4
        torch.testing.assert_close(head._classifier()[0][place], own[place] + mean)
    logits = head(features)
    assert torch.equal(head.predict(features), logits.argmax(1))
    expected = F.cross_entropy(logits, tokens.masked_fill(~valid, -100), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_the_mean_of_the_classes_begins_as_wide_as_the_token_itself():
    drawn, options = torch.zeros(500, 4, 4).long(), TokenDecoderOptions(classes="shared")
    head = TokenHead(500, options, drawn, 60)
    ratio = head.class_weight.std() / head.classifier.weight.std()
    assert ratio.item() == pytest.approx(4, rel=0.05)  # over 16 pixels


def test_a_compiled_loss_has_no_graph_break():
    features, tokens, valid = cells()
    head = make(dropout=0.0)
    whole = torch.compile(head.cross_entropy, backend="eager", fullgraph=True)
    found = whole(features, tokens, valid)
    torch.testing.assert_close(found, head.cross_entropy(features, tokens, valid))
