"""The built-in handwritten digits."""

import pickle

import numpy as np

from fused_beit.engine.data.digits import SIZE, Digits


def test_every_digit_is_in_one_of_two_fixed_parts() -> None:
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1500, 297)
    names = {source.name(i) for source in (train, val) for i in range(len(source))}
    assert names == {f"digits[{i}]" for i in range(1797)}
    assert [val.name(i) for i in range(5)] == [Digits("val").name(i) for i in range(5)]


def test_both_parts_have_the_same_share_of_each_digit() -> None:
    train, val = (np.bincount(Digits(part).labels, minlength=10) for part in ("train", "val"))
    held_out = val / (train + val)
    assert np.abs(held_out * (train + val) - 297 / 1797 * (train + val)).max() <= 1  # to one picture


def test_a_digit_is_light_on_dark_rgb_of_full_contrast() -> None:
    train = Digits("train")
    picture = np.asarray(train.load(0))
    assert picture.shape == (SIZE, SIZE, 3)
    assert (picture[..., 0] == picture[..., 1]).all()
    assert max(np.asarray(train.load(i)).max() for i in range(20)) == 255
    assert np.median(picture) < 64


def test_labels_belong_to_the_pictures() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    val = Digits("val")
    for index in range(0, 297, 37):
        original = int(val.name(index)[len("digits[") : -1])
        assert val.labels[index] == labels[original]
        small = np.asarray(val.load(index).convert("L").resize((10, 10), 4))[1:-1, 1:-1]  # 4: box filter
        assert np.corrcoef(small.ravel(), pixels[original])[0, 1] > 0.95


def test_the_digits_are_small_to_send_to_a_worker() -> None:
    assert len(pickle.dumps(Digits("train"))) < 250_000
