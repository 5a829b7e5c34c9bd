"""What people pass by mistake, at every door of the face: (call, what is said). One sentence, never a traceback of another library."""

from pathlib import Path

import numpy as np
import pytest
import torch

import kvutils as kv
from kvutils.errors import KVUtilsError
from kvutils.readout.features import FeatureExtractor
from kvutils.readout.maps import similarity_to_point
from tests.tiny_models import picture, tiny

X, Y = torch.arange(24.0).reshape(1, 4, 6), torch.tensor([0, 1, 0, 1])


@pytest.fixture(scope="module")
def a(tmp_path_factory):
    """A model, a picture and what is made of it."""
    class Things:
        mlm, image, folder = tiny("pocket"), picture(40, 32), tmp_path_factory.mktemp("folder")
        array = np.asarray(image)
        shot = kv.capture(mlm, [image])[0]
        selection = kv.select_region(mlm, shot.layout, (0, 0, 20, 20))
        session = kv.ImageSession(mlm, image)
        extractor = FeatureExtractor(mlm, keys=False)
    return Things


@pytest.mark.parametrize(("call", "said"), [
    (lambda a: kv.load_mlm("pokcet"), r"unknown model 'pokcet' \(did you mean 'pocket'\?\)"),
    (lambda a: kv.load_mlm(a.mlm), "a model: expected a name, a folder or a hub id, found MLM"),
    (lambda a: kv.load_mlm("pocket", device="meta"), "device 'meta' is not usable"),
    (lambda a: kv.load_mlm("pocket", device=[0]), r"device \[0\] is not usable: expected cpu, cuda"),
    (lambda a: kv.load_mlm("pocket", untrained=True, seed="0"), "seed must be a whole number of at least 0, not '0'"),
    (lambda a: kv.load_mlm("pocket", max_pixels="5"), "max_pixels .* whole number .*, not '5'"),
    (lambda a: kv.load_encoder("pocket"), r"did you mean 'pocket-siglip'\?"),
    (lambda a: kv.capture("pocket", [a.image]), r"the model: expected an MLM, as load_mlm\(\"pocket\"\) gives it, found str 'pocket'"),
    (lambda a: kv.capture(a.mlm, "photo.jpg"), r"images must be a list .* not a single str; write \[picture\]"),
    (lambda a: kv.capture(a.mlm, a.image), "not a single Image"),
    (lambda a: kv.capture(a.mlm, a.array), "not a single ndarray"),
    (lambda a: kv.capture(a.mlm, None), "not a single NoneType"),
    (lambda a: kv.capture(a.mlm, []), "images is empty: expected at least one picture"),
    (lambda a: kv.capture(a.mlm, [a.array]), r"images\[0\]: expected a path or a PIL.Image, not ndarray; PIL.Image.fromarray"),
    (lambda a: kv.capture(a.mlm, [torch.zeros(3, 8, 8)]), r"images\[0\]: .* not Tensor"),
    (lambda a: kv.capture(a.mlm, [[a.image]]), r"images\[0\]: .* not list; one picture is meant here"),
    (lambda a: kv.capture(a.mlm, [a.folder]), "is a folder, and a picture is meant; name the files in it"),
    (lambda a: kv.capture(a.mlm, ["~/no such photo.jpg"]), "photo.jpg: the picture cannot be read .No such file"),
    (lambda a: kv.capture(a.mlm, ["https://example.org/a.png"]), "addresses are not fetched; download the picture"),
    (lambda a: kv.capture(a.mlm, ["file:///tmp/a.png"]), "addresses are not fetched"),
    (lambda a: kv.capture(a.mlm, [a.image], layers="5"), "layer '5' does not exist: .* a list of numbers or \"all\""),
    (lambda a: kv.capture(a.mlm, [a.image], layers="0-3"), "layer '0-3' does not exist"),
    (lambda a: kv.capture(a.mlm, [a.image], layers=1.0), "layer 1.0 does not exist"),
    (lambda a: kv.capture(a.mlm, [a.image], layers=None), "layer None does not exist"),
    (lambda a: kv.capture(a.mlm, [a.image], layers=[True]), "layer True does not exist"),
    (lambda a: kv.capture(a.mlm, [a.image], layers=[]), "no layers asked for"),
    (lambda a: kv.capture(a.mlm, [a.image], [0, 1]), r"prefix: expected a text, found list '\[0, 1\]'"),
    (lambda a: kv.capture(a.mlm, [a.image], batch_size=0), "batch_size must be a whole number of at least 1, not 0"),
    (lambda a: kv.capture(a.mlm, [a.image], batch_size="5"), "batch_size .* not '5'"),
    (lambda a: kv.capture(a.mlm, [a.image], to="gpu"), "device 'gpu' is not usable"),
    (lambda a: a.shot.value("3"), "layer must be a whole number of at least 0, not '3'"),
    (lambda a: a.shot.value(3, 0.0), "head must be a whole number"),
    (lambda a: a.shot.key(3, 9), "unknown key-value head 9; expected one of 0, 1"),
    (lambda a: a.shot.select([999]), "index: expected integers below"),
    (lambda a: a.shot.layout.token_at("ab"), r"points: expected points \(K, 2\) .* found 'ab'"),
    (lambda a: a.shot.layout.token_labels(a.image), r"the mask must be \(H, W\)"),
    (lambda a: similarity_to_point(a.extractor.images([("a", a.image)])[0], "value.1", (50, 3)), r"the point \(50, 3\) is outside .* 40 x 32"),
    (lambda a: a.extractor.images([("a", a.array)]), "a: expected a path or a PIL.Image, not ndarray"),
    (lambda a: FeatureExtractor("pocket"), "the model: expected an MLM"),
    (lambda a: kv.text_values(a.mlm, "car"), "texts must be a list of texts"),
    (lambda a: kv.text_values(a.mlm, []), "texts must be a list of texts"),
    (lambda a: kv.text_values(a.mlm, [5]), "texts must be a list of texts .* found 5"),
    (lambda a: kv.key_variance(a.mlm, a.image), "images must be a list"),
    (lambda a: kv.KeySelection("mine", None, [1]), "mask of mine: expected a bool tensor"),
    (lambda a: a.selection.restrict("1"), r"unknown layer .* '1' \(did you mean 1\?\)"),
    (lambda a: kv.select_region(a.mlm, a.shot, (0, 0, 9, 9)), "layout: expected a TokenLayout, such as capture.layout, found Capture"),
    (lambda a: kv.select_region(a.mlm, a.shot.layout, [(1, 2), (3,)]), r"a region is a box \(x0, y0, x1, y1\)"),
    (lambda a: kv.block_keys(a.mlm, "region", a.shot.layout).__enter__(), "selection: expected a KeySelection, such as select_region gives"),
    (lambda a: kv.block_keys(a.mlm, a.selection, a.shot).__enter__(), "slots: expected a TokenLayout, such as capture.layout"),
    (lambda a: kv.ImageSession("pocket", a.image), "the model: expected an MLM"),
    (lambda a: kv.ImageSession(a.mlm, a.array), "expected a path or a PIL.Image, not ndarray"),
    (lambda a: kv.ImageSession(a.mlm, 5), "expected a path or a PIL.Image, not int"),
    (lambda a: kv.ImageSession(a.mlm, a.image, 5), "prefix: expected a text, found int"),
    (lambda a: a.session.ask("what is this ?"), r"expected a list of at least one question .* a single question is \[question\]"),
    (lambda a: a.session.ask(None), "expected a list of at least one question"),
    (lambda a: a.session.ask(["what is this ?"], "5"), "max_new_tokens .* not '5'"),
    (lambda a: a.session.ask(["what is this ?"], block="all"), "selection: expected a KeySelection"),
    (lambda a: a.session.choose(["what is this ?"], "yes"), "options must be a list of different texts"),
    (lambda a: kv.fit_linear_probe("features", Y), "expected arrays of numbers"),
    (lambda a: kv.fit_linear_probe(X, ["cat", "dog", "cat", "dog"]), r"labels y \(N,\) from 0 on"),
    (lambda a: kv.fit_linear_probe(X, Y / 2), "whole numbers as labels y, found fractions"),
    (lambda a: kv.fit_linear_probe(X, Y, strength="1"), "strength: expected a number, found str '1'"),
    (lambda a: kv.fit_linear_probe(X, Y, max_iter="9"), "max_iter must be a whole number"),
    (lambda a: kv.open_dataset("pocket-pop"), r"did you mean 'pocket-pope'\?"),
    (lambda a: kv.open_dataset(str(a.folder)), r'is a folder: open_dataset\("folder", root='),
    (lambda a: kv.open_dataset("folder", root=5), "root: expected a folder, found int '5'"),
    (lambda a: kv.open_dataset("pocket-davis-2017", count=1, seed=-1), "seed must be a whole number of at least 0, not -1"),
    (lambda a: kv.explore(a.mlm, a.folder), "is a folder, and a picture is meant"),
    (lambda a: kv.explore("pocket", a.image), "expected a model, as load_mlm gives it"),
    (lambda a: kv.explore(a.mlm, a.image, encoder="pocket-siglip"), "encoder_original: expected an Encoder, as load_encoder gives it"),
    (lambda a: kv.wrap_mlm(a.mlm, a.mlm.processor), "unknown model family 'MLM'"),
    (lambda a: kv.fit_linear_probe(X, Y, tol=None), "tol: expected a number"),
])  # fmt: skip
def test_a_mistake_is_answered_in_one_sentence(a, call, said):
    with pytest.raises(KVUtilsError, match=said) as caught:
        call(a)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_meant_is_taken(a):
    """A folder as Path, a picture by name or as it is, a layer or a list of one, an array where a tensor is meant."""
    pocket = Path(kv.data_folder()) / "pocket" / "llava-onevision"
    assert kv.load_mlm(pocket).name == "llava-onevision"
    a.image.save(a.folder / "one.png")
    assert all(kv.capture(a.mlm, [a.image], layers=each)[0].layers == (1,) for each in (torch.tensor(1), torch.tensor([1]), np.array(1)))
    shots = kv.capture(a.mlm, [a.image, str(a.folder / "one.png"), a.folder / "one.png"], layers=1)
    assert all(torch.equal(one.values, shots[0].values) for one in shots) and shots[0].layers == (1,)
    assert a.selection.restrict(1).layers == kv.KeySelection("one", np.ones((1, 2, 3), bool), 1).layers == (1,)
    assert kv.KeyVariance().update(np.zeros((2, 3, 4), np.float32)).count == 2
