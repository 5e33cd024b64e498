"""Plans the shop: products in groups of siblings, livestreams with galleries, clips. Nothing is drawn here.

The plan depends on the numbers of products and clips and on the seed alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

from data_pipeline.faults import WrongUseError
from data_pipeline.synthetic_shop.categories import CATEGORIES
from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.patterns import PATTERNS
from data_pipeline.synthetic_shop.products import PALETTES
from data_pipeline.synthetic_shop.shapes import Colour

GROUP = 3  # siblings at least: they share shape and palette, each has a pattern of its own
LEAST_PRODUCTS = 2 * GROUP
MOST_PRODUCTS = 100_000  # all are planned in memory
GALLERY = 28  # shop images of a test livestream, up to 41 for some numbers of products; small shops show all
CLIPS_A_LIVESTREAM = 8  # in training, of many products, so that the room does not give the product away
TEST_SHARE, VAL_SHARE, UNSEEN_SHARE = 0.2, 0.04, 1 / 6
SECONDS = (2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 11)  # that a clip shows its product; entries are equally likely
FIRST_SECOND = 1_700_000_000_000  # earliest start of a livestream, in milliseconds, as in clip ids
NAMES = (
    "Alva", "Bero", "Cleo", "Dune", "Eiko", "Fjord", "Gala", "Hanna", "Iris", "Juno", "Kiso", "Luma", "Mika", "Nord",
    "Olea", "Pilo", "Quin", "Rosa", "Sora", "Tove", "Ursa", "Vela", "Wren", "Xeno", "Yuki", "Zola",
)  # fmt: skip
SPEECH = (
    "now have a look at this {}", "this {} is one of my favourites", "hold on, closer to the camera: the {}",
    "many of you asked for the {}", "only a few left of this {}", "see how nicely the {} is made",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    index: int
    group: int
    category: str
    palette: tuple[Colour, ...]
    pattern: str
    seen: bool  # in training
    image_id: str
    title: str


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    index: int
    split: str  # train, val or test
    livestream: int
    product: int
    id: str
    length: int  # seconds, and frames
    shown: tuple[int, int]  # (begin, end): the product is in frames begin to end - 1
    others: tuple[int, ...]  # products on the table beside it
    speech: str

    @property
    def folder(self) -> str:
        """The folder of its frames in the source: "query/ID" of test, else "training_video_NN/ID", NN = index % 8."""
        return f"query/{self.id}" if self.split == "test" else f"training_video_{self.index % 8:02d}/{self.id}"

    @property
    def frame_ids(self) -> list[str]:
        return [f"{self.id}-{second:04d}" for second in range(self.length)]


@dataclasses.dataclass(frozen=True, slots=True)
class Livestream:
    index: int
    id: str
    shelf: tuple[int, ...]  # products; of a test livestream: its gallery, in its order


@dataclasses.dataclass(frozen=True)
class Shop:
    seed: int
    products: tuple[Product, ...]
    livestreams: tuple[Livestream, ...]
    clips: tuple[Clip, ...]

    @functools.cached_property
    def clips_by_livestream(self) -> list[list[Clip]]:
        shown: list[list[Clip]] = [[] for _ in self.livestreams]
        for clip in self.clips:
            shown[clip.livestream].append(clip)
        return shown

    @functools.cached_property
    def galleries(self) -> list[Livestream]:
        """The livestreams with a test clip, in the order of their index."""
        tested = {clip.livestream for clip in self.clips_of("test")}
        return [live for live in self.livestreams if live.index in tested]

    @functools.cached_property
    def galleries_of(self) -> list[list[Livestream]]:
        """By product index, the test livestreams with it on their shelf, [] for none."""
        having: list[list[Livestream]] = [[] for _ in self.products]
        for live in self.galleries:
            for product in live.shelf:
                having[product].append(live)
        return having

    def clips_of(self, split: str) -> list[Clip]:
        return [clip for clip in self.clips if clip.split == split]


def plan_shop(*, products: int, clips: int, seed: int) -> Shop:
    """Returns the plan of a shop with so many products and clips.

    Raises WrongUseError if the seed is not 0 to 2**64 - 1, the products are not LEAST_PRODUCTS to MOST_PRODUCTS, or the
    clips are too few for one in test of each product, one in training of each seen product, and one in validation.
    """
    if not 0 <= seed < 2**64:
        raise WrongUseError(f"--seed: found {seed}, needs 0 to 2**64 - 1.")
    if not LEAST_PRODUCTS <= products <= MOST_PRODUCTS:
        raise WrongUseError(
            f"--products: found {products}, needs {LEAST_PRODUCTS} (two groups of {GROUP} siblings) to {MOST_PRODUCTS}."
        )
    seen = products - round(UNSEEN_SHARE * products)
    spare = clips - products - seen
    if spare < 1:
        raise WrongUseError(
            f"--clips: found {clips}, needs at least {products + seen + 1} for {products} products: a test clip of "
            f"each, a training clip of each of the {seen} seen ones, and a validation clip."
        )
    val = min(spare, max(1, round(VAL_SHARE * clips)))
    test = max(products, min(round(TEST_SHARE * clips), clips - val - seen))
    return _plan_livestreams(
        _plan_products(products, seed), {"train": clips - val - test, "val": val, "test": test}, seed
    )


def _plan_products(count: int, seed: int) -> list[Product]:
    groups = count // GROUP
    dice = Dice(seed, "shop")
    categories, palettes, names = dice.shuffled(list(CATEGORIES)), dice.shuffled(PALETTES), dice.shuffled(NAMES)
    unseen = set(dice.shuffled(range(count))[: round(UNSEEN_SHARE * count)])
    products: list[Product] = []
    for group in range(groups):
        turn, place = divmod(group, len(categories))
        palette = palettes[(place + 11 * turn) % len(palettes)]  # 30 groups of a category differ
        patterns = Dice(seed, "siblings", group).shuffled(list(PATTERNS))
        for pattern in patterns[: count // groups + (group < count % groups)]:
            index = len(products)
            title = f"{categories[place].capitalize()} {names[group % len(names)]}, {pattern}"
            image_id = Dice(seed, "image", index).uuid()
            products.append(
                Product(index, group, categories[place], palette, pattern, index not in unseen, image_id, title)
            )
    return products


def share_out(total: int, weights: Sequence[float], least: int) -> list[int]:
    """Returns `total` in whole parts, one a weight: each has `least`, the rest goes by weight (largest remainders)."""
    rest = total - least * len(weights)
    exact = [rest * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: (parts[place] - exact[place], place))
    for place in by_remainder[: rest - sum(parts)]:
        parts[place] += 1
    return [least + part for part in parts]


def _plan_livestreams(products: list[Product], counts: dict[str, int], seed: int) -> Shop:
    """Returns the shop, with `counts` clips by split ("train", "val", "test").

    A product's training clips are spread over livestreams, so that rooms do not give products away. A test clip is in a
    livestream with its product's siblings on the shelf.
    """
    dice = Dice(seed, "streams")
    seen = dice.shuffled([product for product in products if product.seen])
    popularity = {product: 1 / (rank + 2) for rank, product in enumerate(dice.shuffled(products))}  # a long tail
    shows = {"val": [seen[place % len(seen)] for place in range(counts["val"])]}
    for split, of, least in (("train", seen, min(2, counts["train"] // len(seen))), ("test", products, 1)):
        parts = share_out(counts[split], [popularity[product] for product in of], least)
        shows[split] = [product for product, part in zip(of, parts, strict=True) for _ in range(part)]

    training = max(1, round(counts["train"] / CLIPS_A_LIVESTREAM))
    testing = max(1, len(products) // (GALLERY // 2))  # each group is in two of their galleries
    groups = dice.shuffled(range(products[-1].group + 1))
    first = {group: place for place, group in enumerate(groups)}
    presented: list[list[tuple[str, Product]]] = [[] for _ in range(training + testing)]
    for split in ("train", "val"):
        for place, product in enumerate(shows[split]):  # a product's clips are consecutive: each goes to the next room
            presented[place % training].append((split, product))
    turns = dict.fromkeys(groups, 0)
    for product in dice.shuffled(shows["test"]):
        turn = turns[product.group] = turns[product.group] + 1
        presented[training + (first[product.group] + turn % 2) % testing].append(("test", product))
    livestreams: list[Livestream] = []
    clips: list[Clip] = []
    for index, shown in enumerate(presented):
        own = Dice(seed, "stream", index)
        present = {product.group for _, product in shown}
        shelf = tuple(own.shuffled([product.index for product in products if product.group in present]))
        livestreams.append(Livestream(index, own.uuid(), shelf))
        start = FIRST_SECOND + own.below(10**9) * 100
        for split, product in shown:
            clip = _plan_clip(livestreams[-1], split, product, len(clips), start, seed)
            start += 1000 * (clip.length + 5 + own.below(60))
            clips.append(clip)
    return Shop(seed, tuple(products), tuple(livestreams), tuple(clips))


def _plan_clip(live: Livestream, split: str, product: Product, index: int, start: int, seed: int) -> Clip:
    dice = Dice(seed, "clip", index)
    seconds = dice.pick(SECONDS)
    before, after = (dice.below(4) if dice.happens(0.2) else 0 for _ in range(2))  # seconds with the host alone
    length = before + seconds + after
    strangers = dice.shuffled([other for other in live.shelf if other != product.index])
    others = tuple(strangers[: 1 + dice.below(3)]) if dice.happens(0.45) else ()
    speech = dice.pick(SPEECH).format(product.category)
    return Clip(
        index=index, split=split, livestream=live.index, product=product.index,
        id=f"{live.id}-{start}-{start + 1000 * length}", length=length, shown=(before, before + seconds),
        others=others, speech=speech,
    )  # fmt: skip
