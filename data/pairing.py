"""Partners by file name: which mask belongs to which photograph.

Names are paths below a folder without their ending, such as "frog/001". Equal names come first. The rest is paired by
weaker rules, the surest first, and only one to one: if a rule fits two files, it pairs neither. A rule that was needed
is put into words, so that the user can see whether it was the right one.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

# Formats that Pillow reads everywhere.
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpx", ".avif",
)  # fmt: skip
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")

_ENDINGS = re.compile(rf"(?<=.)({'|'.join(map(re.escape, PICTURE_SUFFIXES))})+$")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


_MASK_WORDS = frozenset(_words("""
    mask masks gt gts groundtruth ground truth seg segs segm segment segmented segmentation segmentations
    segmentationclass label labels lbl annotation annotations anno ann matte alpha binary bin manual target targets
    object fg foreground
"""))  # fmt: skip
_SURE_MASK_WORDS = frozenset(_words("mask masks gt groundtruth seg segmentation label labels annotation matte"))
_IMAGE_WORDS = frozenset(_words("""
    image images img imgs im photo photos photograph photographs picture pictures pic pics rgb sat input inputs
    original originals orig jpegimages
"""))  # fmt: skip
# A file whose name adds one of these is something else than the photograph's mask, or belongs to another photograph.
_FOREIGN_WORDS = frozenset(_words("""
    edge edges contour contours boundary boundaries outline depth skeleton flow
    train training tr test testing te val valid validation eval
"""))  # fmt: skip


@dataclass(frozen=True)
class Matching:
    """Pairs of names, and how they were found."""

    partners: Mapping[str, str]  # image's name -> mask's name
    rules: tuple[str, ...]  # how names that are not equal were paired, a clause for each rule
    hint: str  # why names have no partner; empty if nothing is known


def match_names(images: Iterable[str], masks: Iterable[str], what: tuple[str, str] = ("images", "masks")) -> Matching:
    """Pair the names of photographs with the names of masks.

    Args:
        images: the shorter names, if one has a word more.
        masks: the longer ones.
        what: what to call the two in the rules.
    """
    matcher = _Matcher(dict.fromkeys(images), dict.fromkeys(masks), what)
    for bare in (False, True):
        for spelling, difference in _SPELLINGS:
            matcher.pair_by_spelling(spelling, difference, bare)
    for bare in (False, True):
        for spelling in (_without_endings, _without_zeros):
            matcher.pair_by_affix(spelling, bare)
    for bare in (False, True):
        for spelling in (_without_endings, _without_zeros):
            matcher.pair_by_affixes_of_both(spelling, bare)
    order = {image: matcher.partners[image] for image in matcher.images if image in matcher.partners}
    return Matching(order, tuple(matcher.rules), matcher.hint())


def separate(files: Collection[str]) -> tuple[list[str], list[str]] | None:
    """Tell photographs from masks in one folder that holds both.

    Masks are the files with a word such as "mask" or "gt" first or last in their names; if there are none, the files
    that are no JPEG beside JPEGs of the same names.

    Returns:
        file names of the photographs, file names of the masks; None unless every mask has a photograph.
    """
    masks = [file for file in files if _is_called_mask(PurePath(file).stem)]
    if not masks:
        masks = [file for file in files if not file.lower().endswith(_JPEG_SUFFIXES)]
    images = [file for file in files if file not in set(masks)]
    names = [PurePath(file).stem for file in masks]
    pairs = match_names([PurePath(file).stem for file in images], names).partners
    return (images, masks) if len(names) == len(set(names)) == len(pairs) and len(pairs) > 1 else None


def folder_role(name: str) -> tuple[str, str]:
    """Return what a folder's name says it holds ("image", "mask" or ""), and the rest of the name, lower case.

    "train_masks" is ("mask", "train").
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
    rest = "_".join(word for word in words if word not in _MASK_WORDS | _IMAGE_WORDS)
    role = "mask" if not _MASK_WORDS.isdisjoint(words) else "image" if not _IMAGE_WORDS.isdisjoint(words) else ""
    return role, rest


# Spellings, each blind to one more difference between names than the one before.


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    return _composed(_composed(name).casefold())


def _without_endings(name: str) -> str:
    return _ENDINGS.sub("", _caseless(name))


def _without_zeros(name: str) -> str:
    return _LEADING_ZEROS.sub("", _without_endings(name))


def _without_roles(name: str) -> str:
    """Leave out what folders say about their contents: "frog_masks/1" becomes "frog/1"."""
    *folders, base = _without_zeros(name).split("/")
    return "/".join([*(folder_role(folder)[1] for folder in folders), base])


Spelling = Callable[[str], str]
_Key = tuple[str, str]  # folder and last part of a name in some spelling
_SPELLINGS: tuple[tuple[Spelling, str], ...] = (
    (str, ""),
    (_composed, "how their accents are encoded (NFC, NFD)"),
    (_caseless, "letter case"),
    (_without_endings, "a second ending"),
    (_without_zeros, "leading zeros"),
    (_without_roles, "words for images and masks in folders' names"),
)


class _Matcher:
    """Names, the pairs found so far, and the rules to find more."""

    def __init__(self, images: Mapping[str, None], masks: Mapping[str, None], what: tuple[str, str]) -> None:
        self.images, self.masks = images, masks
        self.what = what
        self.partners: dict[str, str] = {}
        self.rules: list[str] = []

    @property
    def free_images(self) -> list[str]:
        return [image for image in self.images if image not in self.partners]

    @property
    def free_masks(self) -> list[str]:
        taken = set(self.partners.values())
        return [mask for mask in self.masks if mask not in taken]

    def pair_by_spelling(self, spelling: Spelling, difference: str, bare: bool) -> None:
        """Pair names that are equal in a spelling.

        Args:
            spelling: the spelling.
            difference: what the spelling does not show; empty if it shows everything.
            bare: compare only the last part of the names, without sub-folders.
        """
        images, masks = self._free_keys(spelling, bare)
        found = {image: masks[key] for key, image in images.items() if key in masks}
        blind_to = [*(["sub-folder"] if bare else []), *([difference] if difference else [])]
        if found and blind_to:
            shown = "" if spelling is _composed else f", such as {_example(found)}"
            self.rules.append(f"{len(found)} pairs differ in {' and '.join(blind_to)}{shown}")
        self.partners.update(found)

    def pair_by_affix(self, spelling: Spelling, bare: bool) -> None:
        """Pair masks whose names are their photographs' with something before or after: "moth_mask", "GT-moth".

        If that is no word for a mask, nothing must have been paired before, and no mask or no photograph must be left.
        """
        images, masks = self._free_keys(spelling, bare)
        by_affix: dict[_Affix, dict[str, str]] = defaultdict(dict)
        for key, mask in masks.items():
            fitting = sorted(_affixes(key, images), key=lambda pair: len(pair[0].text))
            named = [(affix, image) for affix, image in fitting if affix.says_mask]
            for affix, image in named[:1] or fitting:
                by_affix[affix][image] = mask
        named = {affix: found for affix, found in by_affix.items() if affix.says_mask}
        for affix, found in named.items():
            rivals = [
                rival
                for other, rival in named.items()
                if other != affix and (len(rival) >= len(found) or _words(other.text) == _words(affix.text))
            ]
            clear = {image: mask for image, mask in found.items() if not any(image in rival for rival in rivals)}
            self._take_by_affix(affix, clear)
        if not self.partners:
            whole = [(affix, found) for affix, found in by_affix.items() if affix.is_neutral and self._is_whole(found)]
            if len(whole) == 1:
                self._take_by_affix(*whole[0])

    def _take_by_affix(self, affix: "_Affix", found: Mapping[str, str]) -> None:
        if found:
            self.rules.append(f"{self._masks(found)} {affix.describe(next(iter(found.values())))}; paired by the rest")
            self.partners.update(found)

    def pair_by_affixes_of_both(self, spelling: Spelling, bare: bool) -> None:
        """Pair names such as "104_sat" and "104_mask", if nothing has been paired before and none would be left."""
        if self.partners:
            return
        images, masks = self._free_keys(spelling, bare)
        if min(len(images), len(masks)) < 2:
            return
        (image_head, image_tail), (mask_head, mask_tail) = _common_ends(images), _common_ends(masks)
        if not _may_pair(f"{image_head} {image_tail}", f"{mask_head} {mask_tail}"):
            return
        mask_of = {(folder, _between(base, mask_head, mask_tail)): mask for (folder, base), mask in masks.items()}
        rests = {image: (folder, _between(base, image_head, image_tail)) for (folder, base), image in images.items()}
        found = {image: mask_of[rest] for image, rest in rests.items() if rest in mask_of}
        if self._is_whole(found):
            like_image, like_mask = f"{image_head}...{image_tail}", f"{mask_head}...{mask_tail}"
            names = f"{self.what[0]} are named {like_image} and {self._masks(found)} {like_mask}"
            self.rules.append(f"{names}; paired by the rest")
            self.partners.update(found)

    def hint(self) -> str:
        images, masks = self.free_images, self.free_masks
        if not images or not masks:
            return ""
        by_image = self._several_masks(images, masks)
        if by_image:
            image, fitting = next(iter(by_image.items()))
            shown = ", ".join(fitting[:3])
            several = f"{len(by_image)} {self.what[0]} have several {self.what[1]}"
            return f"{several} ({image}: {shown}), and one each is needed"
        return "" if self.partners else f"the names are such as {images[0]} and {masks[0]}"

    def _several_masks(self, images: Collection[str], masks: Collection[str]) -> dict[str, list[str]]:
        named = {_key(image, _without_endings, True): image for image in images}
        by_image: dict[str, list[str]] = defaultdict(list)
        for mask in masks:
            key = _key(mask, _without_endings, True)
            fitting = [image for affix, image in _affixes(key, named, digits=True) if affix.is_last]
            for image in fitting[-1:]:  # the longest name
                by_image[image].append(mask)
        return {image: fitting for image, fitting in by_image.items() if len(fitting) > 1}

    def _free_keys(self, spelling: Spelling, bare: bool) -> tuple[dict[_Key, str], dict[_Key, str]]:
        """Return key -> name of free photographs and masks; keys that two names share, free or not, are left out."""
        images, masks = self.free_images, self.free_masks
        if not images or not masks or (bare and not any("/" in name for name in (*self.images, *self.masks))):
            return {}, {}
        return _unique_keys(self.images, images, spelling, bare), _unique_keys(self.masks, masks, spelling, bare)

    def _is_whole(self, found: Mapping[str, str]) -> bool:
        return len(found) > 1 and len(found) in (len(self.images), len(self.masks))

    def _masks(self, found: Mapping[str, str]) -> str:
        whole = len(found) == len(self.masks)
        return f"all {len(found)} {self.what[1]}" if whole else f"{len(found)} of {len(self.masks)} {self.what[1]}"


@dataclass(frozen=True)
class _Affix:
    """Text before or after a photograph's name in its mask's name, in lower case."""

    text: str
    is_last: bool

    @property
    def says_mask(self) -> bool:
        return _says(self.text, _MASK_WORDS) and not _says(self.text, _FOREIGN_WORDS)

    @property
    def is_neutral(self) -> bool:
        return not _says(self.text, _FOREIGN_WORDS) and not any(map(str.isdigit, self.text))

    def describe(self, mask: str) -> str:
        """Return "end in _Mask", in the spelling of a mask's name."""
        base = mask.rpartition("/")[2]
        stored = base[-len(self.text) :] if self.is_last else base[: len(self.text)]
        text = stored if stored.casefold() == self.text else self.text
        return f"end in {text}" if self.is_last else f"begin with {text}"


def _affixes(key: _Key, images: Mapping[_Key, str], digits: bool = False) -> Iterator[tuple[_Affix, str]]:
    """Yield what a mask's name has before or after each photograph's name in it, and that photograph's name.

    Args:
        key: of the mask.
        images: photographs by key.
        digits: accept numbers, as in "moth_1": objects of one photograph, or moments of one scene.
    """
    folder, base = key
    for cut in range(1, len(base)):
        head, tail = base[:cut], base[cut:]
        if head[-1].isdigit() and tail[0].isdigit():
            continue
        for text, name, is_last in ((tail, head, True), (head, tail, False)):
            image = images.get((folder, name))
            if image is None or not (digits or re.fullmatch(r"\D+\d?", text)):
                continue
            if text in _MASK_WORDS or not (head[-1].isalpha() and tail[0].isalpha()):
                yield _Affix(text, is_last), image


def _may_pair(image_ends: str, mask_ends: str) -> bool:
    """Return whether masks with these ends may belong to images with those."""
    if mask_ends.strip():
        return _says(mask_ends, _MASK_WORDS) and not _says(mask_ends, _FOREIGN_WORDS)
    return not _says(image_ends, _FOREIGN_WORDS)


def _common_ends(keys: Collection[_Key]) -> tuple[str, str]:
    """Return what all names begin with and end in, cut back to whole words and numbers."""
    names = [base for _, base in keys]
    head = _common_start(names)
    tail = _common_start([name[len(head) :][::-1] for name in names])[::-1]
    rests = [_between(name, head, tail) for name in names]
    if not all(rest[:1].isdigit() for rest in rests):
        head = re.sub(r"[^\W\d_]+$", "", head)
    if not all(rest[-1:].isdigit() for rest in rests):
        tail = re.sub(r"^[^\W\d_]+", "", tail)
    return re.sub(r"\d+$", "", head), re.sub(r"^\d+", "", tail)


def _common_start(texts: Collection[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[:length]


def _between(text: str, head: str, tail: str) -> str:
    return text[len(head) : len(text) - len(tail)]


def _key(name: str, spelling: Spelling, bare: bool) -> _Key:
    folder, _, base = spelling(name).rpartition("/")
    return "" if bare else folder, base


def _unique_keys(names: Iterable[str], free: Iterable[str], spelling: Spelling, bare: bool) -> dict[_Key, str]:
    count = Counter(_key(name, spelling, bare) for name in names)
    keys = {_key(name, spelling, bare): name for name in free}
    return {key: name for key, name in keys.items() if count[key] == 1}


def _example(found: Mapping[str, str]) -> str:
    image, mask = next(iter(found.items()))
    return f"{image} and {mask}"


def _says(text: str, words: frozenset[str]) -> bool:
    return not words.isdisjoint(_words(text))


def _is_called_mask(stem: str) -> bool:
    words = _words(stem)
    return bool(words) and not _SURE_MASK_WORDS.isdisjoint((words[0], words[-1])) and not _says(stem, _FOREIGN_WORDS)
