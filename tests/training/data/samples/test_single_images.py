"""Single images: crops draw for draw as torchvision's, mixtures of frames and a folder, colors changed twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.geometry import nearest_indices
from geo_pretrain.training.data.frame import Frame, Pair
from geo_pretrain.training.data.samples.augment import augment_colors, crop_resize, random_box
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.data.samples.single_images import CropSamples, TwoColorViews, list_images
from geo_pretrain.training.recipe import AugmentSpec, DataSpec

PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)
CONTRACT = ImageContract()


def noise(seed, height=40, width=50):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Frames:
    """Frame k is noise of seed k with depth k + 1; those in `broken` cannot be read."""

    name = "frames"

    def __init__(self, broken=()):
        self.broken = broken

    def scenes(self):
        return ["s"]

    def frame_ids(self, scene):
        return list("0123")

    def load(self, scene, frame_id):
        if frame_id in self.broken:
            raise BadFrame(f"{scene}/{frame_id}", "gone")
        color = noise(int(frame_id))
        return Frame(scene, frame_id, color, np.full((40, 50), int(frame_id) + 1.0, np.float32), np.eye(3), np.eye(4))

    def fingerprint(self):
        return ""


PAIRS = [Pair("s", a, b, 0.5) for a, b in ("01", "02", "13", "23")]  # frame 0 is listed twice, 3 never first


def image_folder(path, count=7):
    """ImageNet's layout: class folders with JPEGs; image k is gray of brightness 20 k."""
    for k in range(count):
        folder = path / ("n01440764", "n01443537")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + k, 45), (20 * k, 20 * k, 20 * k)).save(folder / f"{k}.JPEG", quality=95)
    return path


def crops(spec=DataSpec(size=(32, 48), augment=PLAIN), source=None, pairs=PAIRS, **options):
    options = {"scale": (0.2, 1.0), "flip_prob": 0.5} | options
    return CropSamples(source or Frames(), pairs, spec, 5, CONTRACT, **options)


@pytest.mark.parametrize("size", [(40, 50), (20, 300), (300, 20), (97, 41)])
def test_crop_is_torchvisions_draw_for_draw(size):
    """Long images also reach the box in the middle that is taken when ten boxes do not fit."""
    image = noise(1, *size)
    theirs = RandomResizedCrop((32, 48), scale=(0.2, 1.0))
    for seed in range(40):
        torch.manual_seed(seed)
        want = theirs(Image.fromarray(image))
        torch.manual_seed(999)
        box = random_box(size, (0.2, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(seed))
        got = crop_resize(image, box, (32, 48))
        assert np.array_equal(np.asarray(got), np.asarray(want)), seed


@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_a_sample_is_two_crops_of_the_first_frame_flipped_and_normalized(flip_prob):
    sample = crops(flip_prob=flip_prob)[(3, 2)]
    torch.manual_seed(sample_seed(5, 3, 2))  # what follows draws from the global generator, as torchvision does
    for k in (1, 2):
        want = tvf.to_image(RandomResizedCrop((32, 48), scale=(0.2, 1.0))(Image.fromarray(noise(1)))).float() / 255
        torch.rand(4)  # jitter, gray, blur, flip
        want = want.flip(-1) if flip_prob else want
        want = (want - torch.tensor(CONTRACT.mean)[:, None, None]) / torch.tensor(CONTRACT.std)[:, None, None]
        assert sample[f"image{k}"].shape == (1, 3, 32, 48)
        torch.testing.assert_close(sample[f"image{k}"][0], want)
    assert not torch.equal(sample["image1"], sample["image2"])


def test_sample_depends_on_seed_epoch_and_position_alone():
    one, other = crops(), crops()
    assert torch.equal(one[(0, 1)]["image2"], other[(0, 1)]["image2"])
    assert one[(0, 1)]["seed"] == other[(0, 1)]["seed"] != one[(1, 1)]["seed"]
    assert not torch.equal(one[(0, 1)]["image1"], one[(1, 1)]["image1"])
    assert not torch.equal(one[(0, 0)]["image1"], one[(0, 1)]["image1"])  # the same frame, listed again


def test_half_of_the_views_are_flipped():
    data = crops(scale=(1.0, 1.0), pairs=[PAIRS[2]], spec=DataSpec(size=(40, 50), augment=PLAIN))
    views = [data[(epoch, 0)][f"image{k}"][0] for epoch in range(150) for k in (1, 2)]
    # a whole crop that fits is the frame or its mirror image
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONTRACT.mean, CONTRACT.std))
    frame = (torch.from_numpy(noise(1)).permute(2, 0, 1) / 255 - mean) / std
    flipped = [(view - frame.flip(-1)).abs().mean() < (view - frame).abs().mean() for view in views]
    assert 110 < sum(map(int, flipped)) < 190


def test_frames_are_resized_to_the_nearest_pixel_before_the_crop():
    data = crops(scale=(1.0, 1.0), flip_prob=0.0, resize=(20, 25), spec=DataSpec(size=(20, 25), augment=PLAIN))
    found = {tuple(value) for epoch in range(5) for value in back(data[(epoch, 2)]["image1"][0]).reshape(-1, 3)}
    whole = {tuple(value) for value in noise(1).reshape(-1, 3)}
    assert found & whole  # some crops are the whole image: values of the frame itself, no means of them
    small = crops(scale=(1.0, 1.0), flip_prob=0.0, spec=DataSpec(size=(20, 25), augment=PLAIN))
    assert not torch.equal(small[(0, 2)]["image1"], data[(0, 2)]["image1"])


def back(image):
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONTRACT.mean, CONTRACT.std))
    return ((image * std + mean) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


def brightness(image):
    """Which gray image of the folder this is; -1 for a frame (noise)."""
    pixels = back(image).astype(float)
    return -1 if pixels.std() > 10 else round(pixels.mean() / 20)


def test_combine_is_one_list_of_frames_and_images(tmp_path):
    images = list_images(str(image_folder(tmp_path / "in")))
    data = crops(images=images, mix="combine")
    assert len(data) == len(PAIRS) + 7
    kinds = [brightness(data[(0, k)]["image1"][0]) for k in range(len(data))]
    assert kinds == [-1] * 4 + [0, 2, 4, 6, 1, 3, 5]  # class by class
    assert data[(0, 5)]["image2"].shape == (1, 3, 32, 48)


@pytest.mark.parametrize("count", [7, 3, 1])
def test_batch_mixing_holds_a_frame_and_an_image_and_repeats_the_fewer(tmp_path, count):
    images = list_images(str(image_folder(tmp_path / "in", max(count, 2))))[:count]
    data = crops(images=images, mix="batch")
    assert len(data) == max(len(PAIRS), count)
    partners = []
    for epoch in range(4):
        samples = [data[(epoch, k)] for k in range(len(data))]
        assert all(
            brightness(s[f"image{v}"][0]) == -1 != brightness(s[f"image{v}"][1]) for s in samples for v in (1, 2)
        )
        seen = Counter(brightness(s["image1"][1]) for s in samples)
        assert len(seen) == count
        assert max(seen.values()) - min(seen.values()) <= 1
        partners.append([data._repeated((epoch, k), min(count, len(PAIRS))) for k in range(len(data))])
    assert all(set(p) == set(range(min(count, len(PAIRS)))) for p in partners)
    if count > 1:
        assert len({tuple(p) for p in partners}) > 1


def test_files_that_break_are_replaced_and_named(tmp_path):
    images = list_images(str(image_folder(tmp_path / "in", 4)))
    images[0].write_bytes(b"\xff\xd8\xff broken")
    data = crops(source=Frames(broken="0"), images=images, mix="batch")
    sample = data[(0, 0)]
    reasons = dict(item for k in range(4) for item in data[(0, k)]["skipped"])
    assert reasons["s/0"] == "gone"
    assert any(path == str(images[0]) and "cannot be read" in why for path, why in reasons.items())
    assert sample["image1"].shape == (2, 3, 32, 48)
    with pytest.raises(DataError, match=r"16 images in a row cannot be read(.|\n)*s/0: gone"):
        crops(source=Frames(broken="0123"))[(0, 0)]


def test_what_replaces_a_broken_file_is_drawn_from_its_own_list(tmp_path):
    images = list_images(str(image_folder(tmp_path / "in", 4)))
    images[0].write_bytes(b"\xff\xd8\xff broken")
    data = crops(pairs=PAIRS[2:3], images=images, mix="batch")  # one frame, four images
    found = {brightness(data[(epoch, 0)]["image1"][1]) for epoch in range(12)}
    assert found == {1, 2, 3}
    data = crops(source=Frames(broken="0"), images=images, mix="combine")  # of frames 0, 0, 1, 2
    assert {brightness(data[(epoch, 0)]["image1"][0]) for epoch in range(12)} == {-1}
    data = TwoColorViews(Frames(broken="0"), PAIRS, DataSpec(size=(32, 48)), 5, CONTRACT, blur_taps=None)
    assert {float(data[(epoch, 0)]["depth"][0, 0]) for epoch in range(12)} == {2.0, 3.0}


def test_partners_in_a_mixed_batch_depend_on_the_seed(tmp_path):
    images = list_images(str(image_folder(tmp_path / "in", 7)))
    options = {"scale": (0.2, 1.0), "flip_prob": 0.5, "images": images, "mix": "batch"}
    partners = set()
    for seed in range(8):
        data = CropSamples(Frames(), PAIRS, DataSpec(size=(32, 48)), seed, CONTRACT, **options)
        partners.add(tuple(data._repeated((0, k), len(PAIRS)) for k in range(len(data))))
    assert len(partners) > 1


def test_images_are_the_same_wherever_their_folder_lies(tmp_path):
    def facts(folder):
        return crops(images=list_images(str(folder)), mix="combine").own_data()

    here = facts(image_folder(tmp_path / "in"))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert facts(tmp_path / "elsewhere") == here == here | {"images": 7}


def test_folder_of_images_that_is_none_is_explained(tmp_path):
    with pytest.raises(RecipeError, match=r"'task.images' is missing(.|\n)*--set task.images=PATH"):
        list_images(None)
    with pytest.raises(DataError, match="no such folder"):
        list_images(str(tmp_path / "nowhere"))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.JPEG")
    with pytest.raises(DataError, match="class folder"):
        list_images(str(tmp_path / "flat"))
    (tmp_path / "flat" / "n1").mkdir()
    with pytest.raises(DataError, match=r"n1(.|\n)*class folders"):
        list_images(str(tmp_path / "flat"))
    assert [Path(p).name for p in list_images(str(image_folder(tmp_path / "in", 3)))] == ["0.JPEG", "2.JPEG", "1.JPEG"]


def slow_blur(image, taps, sigma):
    """A Gaussian of `taps` x `taps`, mirrored at the border, pixel by pixel."""
    half = taps // 2
    axis = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    kernel = np.outer(axis, axis) / np.outer(axis, axis).sum()
    padded = np.pad(image, ((0, 0), (half, half), (half, half)), mode="reflect")

    def at(channel, i, j):
        return (channel[i : i + taps, j : j + taps] * kernel).sum()

    rows, columns = range(image.shape[1]), range(image.shape[2])
    return np.array([[[at(channel, i, j) for j in columns] for i in rows] for channel in padded])


def test_blur_by_taps_is_a_gaussian_and_is_always_drawn():
    spec = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=1.0, blur_radius=(0.5, 2.0))
    color = noise(3, 30, 34)
    generator = torch.Generator().manual_seed(4)
    got = augment_colors(color, spec, generator, 25)
    torch.manual_seed(4)
    torch.rand(3)  # jitter, gray, Pillow's blur: none
    torch.rand(())
    sigma = 0.5 + 1.5 * float(torch.rand(()))
    want = slow_blur(color.transpose(2, 0, 1) / 255, 25, sigma)
    np.testing.assert_allclose(got.numpy(), want, atol=2e-6)
    assert not torch.equal(got, augment_colors(color, spec, torch.Generator().manual_seed(4)))  # Pillow's
    never = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0.0)
    assert np.array_equal(augment_colors(color, never, generator, 25) * 255, color.transpose(2, 0, 1))


def test_blur_is_cut_where_the_image_is_too_small_to_mirror():
    spec = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=1.0, blur_radius=(1.0, 1.0))
    image = noise(3, 8, 34)
    got = augment_colors(image, spec, torch.Generator().manual_seed(4), 25)
    np.testing.assert_allclose(got.numpy(), slow_blur(image.transpose(2, 0, 1) / 255, 15, 1.0), atol=2e-6)


def test_one_frame_twice_is_pixel_upon_pixel():
    spec = DataSpec(size=(20, 25), augment=PLAIN)
    sample = TwoColorViews(Frames(), PAIRS, spec, 5, CONTRACT, blur_taps=25)[(0, 3)]
    assert torch.equal(sample["image1"], sample["image2"])
    rows, columns = nearest_indices(40, 20), nearest_indices(50, 25)
    assert np.array_equal(back(sample["image1"]), noise(2)[np.ix_(rows, columns)])
    assert sample["depth"].shape == (20, 25)
    assert (sample["depth"] == 3).all()
    spec = DataSpec(size=(40, 50), augment=AugmentSpec(jitter_prob=1.0))
    data = TwoColorViews(Frames(), PAIRS, spec, 5, CONTRACT, blur_taps=25)
    one, again = data[(0, 3)], data[(0, 3)]
    assert not torch.equal(one["image1"], one["image2"])
    assert torch.equal(one["image2"], again["image2"])
    assert not torch.equal(one["image2"], data[(1, 3)]["image2"])
    broken = TwoColorViews(Frames(broken="2"), PAIRS, spec, 5, CONTRACT, blur_taps=None)[(0, 3)]
    assert broken["skipped"][0] == ("s/2", "gone")
    assert len(data) == 4
