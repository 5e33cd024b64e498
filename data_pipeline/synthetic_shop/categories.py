"""The 34 categories of the drawn shop: the parts that a product of each is made of.

Each function draws the proportions from the dice of the product's group, so that siblings share one shape.
"""

from collections.abc import Callable

from data_pipeline.synthetic_shop.dice import Dice
from data_pipeline.synthetic_shop.shapes import Part, Relief, arc, curve, mirrored, oval, plate, turned


def bottle(
    dice: Dice, *, neck: float, body: float, top: float, shoulder: float, cap: str, relief: Relief = "round"
) -> list[Part]:
    body *= dice.uniform(0.88, 1.12)
    neck *= dice.uniform(0.9, 1.1)
    shoulder += dice.uniform(-0.03, 0.04)
    waist = body * dice.pick((1.0, 1.0, 0.88))
    profile = [(neck, top), (neck, shoulder - 0.09), (body, shoulder + 0.05), (waist, 0.7), (body, 0.9), (body, 0.965)]
    return [
        Part(turned(profile), "body", relief),
        Part(plate(0.5 - 1.15 * neck, top - 0.1, 0.5 + 1.15 * neck, top + 0.02), cap, "round"),
    ]


def perfume(dice: Dice) -> list[Part]:
    half = dice.uniform(0.26, 0.34)
    return [
        Part(plate(0.44, 0.22, 0.56, 0.36), "steel", "round"),
        Part(plate(0.5 - half, 0.34, 0.5 + half, 0.95, dice.pick((0.03, 0.1, 0.2))), "body", "flat"),
        Part(dice.pick((plate(0.4, 0.06, 0.6, 0.25), oval(0.5, 0.16, 0.24, 0.22))), "core", "round"),
    ]


def carton(dice: Dice, *, width: float, height: float, depth: float, ribbon: bool = False) -> list[Part]:
    width, height = width * dice.uniform(0.92, 1.08), height * dice.uniform(0.94, 1.04)
    left, bottom = 0.5 - (width + depth) / 2, 0.96
    right, top, rise = left + width, bottom - height, 0.6 * depth
    lid = [(left, top), (left + depth, top - rise), (right + depth, top - rise), (right, top)]
    side = [(right, top), (right + depth, top - rise), (right + depth, bottom - rise), (right, bottom)]
    front = [(left, top), (right, top), (right, bottom), (left, bottom)]
    parts = [Part(lid, "ground", "lid"), Part(side, "ground", "side"), Part(front, "body", "flat")]
    if ribbon:
        middle, bow = (left + right) / 2, top - 0.4 * rise
        parts.append(Part([(middle, top), (middle, bottom)], "core", "flat", 0.05))
        for wing in (-1, 1):
            loop = [(middle, bow), (middle + wing * 0.16, bow - 0.15), (middle + wing * 0.2, bow - 0.02)]
            parts.append(Part(curve(loop), "core", "cloth"))
    return parts


def notebook(dice: Dice) -> list[Part]:
    left, right = 0.2 - dice.uniform(0, 0.04), 0.8 + dice.uniform(0, 0.04)
    return [
        Part(plate(left + 0.03, 0.09, right + 0.03, 0.97, 0.03), "white", "side"),
        Part(plate(left, 0.05, right, 0.94, 0.03), "body", "flat"),
        Part(plate(left, 0.05, left + 0.07, 0.94, 0.02), "core", "side"),
        Part([(right - 0.09, 0.05), (right - 0.09, 0.94)], "dark", "flat", 0.016),
    ]


def jar(dice: Dice, *, half: float, top: float, lid: str, belly: float = 1.06) -> list[Part]:
    half *= dice.uniform(0.92, 1.06)
    top += dice.uniform(-0.03, 0.05)
    profile = [(0.86 * half, top), (half, top + 0.09), (belly * half, 0.66), (half, 0.9), (0.9 * half, 0.96)]
    return [
        Part(turned(profile), "body", "round"),
        Part(plate(0.5 - 0.95 * half, top - 0.11, 0.5 + 0.95 * half, top + 0.03, 0.03), lid, "round"),
    ]


def candle(dice: Dice) -> list[Part]:
    half, top = dice.uniform(0.25, 0.31), dice.uniform(0.34, 0.42)
    return [
        Part([(0.5, top - 0.12), (0.5, top)], "dark", "flat", 0.018),
        Part(curve([(0.5, top - 0.27), (0.545, top - 0.15), (0.5, top - 0.09), (0.455, top - 0.15)]), "glow"),
        Part(turned([(half, top), (half, 0.6), (half, 0.96)]), "body", "round"),
        Part(oval(0.5, top, 2 * half, 0.09), "glow", "lid"),
    ]


def can(dice: Dice) -> list[Part]:
    half, top = dice.uniform(0.26, 0.32), 0.1
    profile = [(0.8 * half, top), (half, top + 0.07), (half, 0.5), (half, 0.9), (0.82 * half, 0.965)]
    return [
        Part(turned(profile), "body", "round"),
        Part(oval(0.5, top, 1.64 * half, 0.07), "steel", "lid"),
        Part(oval(0.5, top + 0.005, 0.5 * half, 0.03), "dark", "lid"),
    ]


def mug(dice: Dice) -> list[Part]:
    half, top = dice.uniform(0.27, 0.32), dice.uniform(0.2, 0.3)
    foot = half * dice.uniform(0.72, 1.0)
    x, y = 0.44 + half, (top + 0.94) / 2
    ear = [(x, y - 0.2), (x + 0.2, y - 0.16), (x + 0.2, y + 0.1), (x - 0.02, y + 0.2)]
    rim = [(0.44 + u - 0.5, v) for u, v in turned([(half, top), (half, 0.6), (0.98 * foot, 0.9), (0.8 * foot, 0.95)])]
    return [
        Part(curve(ear, closed=False), "ground", "round", 0.065),
        Part(rim, "body", "round"),
        Part(oval(0.44, top, 2 * half, 0.1), "ground", "lid"),
        Part(oval(0.44, top + 0.006, 1.82 * half, 0.074), "inside"),
    ]


def bowl(dice: Dice) -> list[Part]:
    top, foot = dice.uniform(0.36, 0.44), dice.uniform(0.12, 0.2)
    return [
        Part(plate(0.5 - foot, 0.84, 0.5 + foot, 0.93), "core", "round"),
        Part(turned([(0.45, top), (0.43, 0.6), (0.28, 0.8), (foot, 0.88)]), "body", "round"),
        Part(oval(0.5, top, 0.9, 0.17), "ground", "lid"),
        Part(oval(0.5, top + 0.008, 0.82, 0.135), "inside"),
    ]


def vase(dice: Dice) -> list[Part]:
    neck, belly, middle = dice.uniform(0.08, 0.14), dice.uniform(0.27, 0.36), dice.uniform(0.55, 0.7)
    profile = [(1.4 * neck, 0.06), (neck, 0.2), (belly, middle), (0.5 * belly, 0.92), (0.55 * belly, 0.96)]
    return [
        Part(turned(profile), "body", "round"),
        Part(oval(0.5, 0.065, 2.8 * neck, 0.055), "inside"),
    ]


def teapot(dice: Dice) -> list[Part]:
    half, top = dice.uniform(0.27, 0.31), dice.uniform(0.3, 0.36)
    spout = [(0.3, 0.78), (0.17, 0.62), (0.12, 0.46), (0.04, 0.4), (0.12, 0.37), (0.2, 0.46), (0.3, 0.56)]
    return [
        Part(curve(spout), "figure", "round"),
        Part(curve([(0.72, 0.45), (0.92, 0.46), (0.9, 0.68), (0.7, 0.76)], closed=False), "figure", "round", 0.055),
        Part(turned([(0.45 * half, top), (half, 0.52), (half, 0.72), (0.6 * half, 0.92)]), "body", "ball"),
        Part(turned([(0.02, top - 0.09), (0.5 * half, top), (0.55 * half, top + 0.035)]), "figure", "round"),
        Part(oval(0.5, top - 0.11, 0.08, 0.08), "core", "ball"),
    ]


def dish(dice: Dice) -> list[Part]:
    size = dice.uniform(0.86, 0.92)
    return [
        Part(oval(0.5, 0.5, size, size), "ground", "ball"),
        Part(oval(0.5, 0.5, 0.86 * size, 0.86 * size), "body", "flat"),
        Part(oval(0.5, 0.5, 0.3 * size, 0.3 * size), "ground", "flat"),
    ]


def tote(dice: Dice) -> list[Part]:
    top, flare = dice.uniform(0.34, 0.42), dice.uniform(-0.04, 0.04)
    handle = [(0.34, top + 0.03), (0.36, 0.13), (0.5, 0.05), (0.64, 0.13), (0.66, top + 0.03)]
    body = mirrored([(0.82 - flare, top), (0.84 + flare, 0.9), (0.8 + flare, 0.95)])
    return [
        Part(curve(handle, closed=False), "figure", "cloth", 0.045),
        Part(body, "body", "cloth"),
        Part([(0.18 + flare, top + 0.02), (0.82 - flare, top + 0.02)], "figure", "cloth", 0.05),
    ]


def handbag(dice: Dice) -> list[Part]:
    top, wide = dice.uniform(0.4, 0.48), dice.uniform(0.38, 0.44)
    handle = [(0.3, top + 0.05), (0.32, 0.2), (0.5, 0.1), (0.68, 0.2), (0.7, top + 0.05)]
    body = mirrored(curve([(0.5 + 0.8 * wide, top), (0.5 + wide, 0.72), (0.5 + 0.92 * wide, 0.93)], closed=False))
    return [
        Part(curve(handle, closed=False), "dark", "round", 0.045),
        Part(body, "body", "cloth"),
        Part([(0.5 - 0.8 * wide, top + 0.02), (0.5 + 0.8 * wide, top + 0.02)], "core", "flat", 0.06),
        Part(oval(0.5, top + 0.07, 0.1, 0.1), "steel", "ball"),
    ]


def backpack(dice: Dice) -> list[Part]:
    wide, pocket = dice.uniform(0.31, 0.36), dice.uniform(0.6, 0.68)
    back = mirrored(curve([(0.5, 0.13), (0.5 + 0.8 * wide, 0.2), (0.5 + wide, 0.5), (0.5 + wide, 0.93)], closed=False))
    return [
        Part(curve([(0.42, 0.16), (0.44, 0.05), (0.56, 0.05), (0.58, 0.16)], closed=False), "dark", "cloth", 0.035),
        Part(plate(0.44 - wide, 0.5, 0.56 + wide, 0.9, 0.06), "figure", "side"),
        Part(back, "body", "cloth"),
        Part(plate(0.5 - 0.7 * wide, pocket, 0.5 + 0.7 * wide, 0.9, 0.05), "ground", "cloth"),
        Part([(0.5 - 0.6 * wide, pocket + 0.05), (0.5 + 0.6 * wide, pocket + 0.05)], "core", "flat", 0.022),
    ]


def snack_bag(dice: Dice) -> list[Part]:
    wide = dice.uniform(0.3, 0.36)
    teeth = [(0.5 - wide + wide * k / 8, 0.05 + 0.018 * (k % 2)) for k in range(17)]
    right, left = [(0.5 + w * wide, y) for w, y in ((0.94, 0.3), (1, 0.6), (0.97, 0.94))], [(0.5 - wide, 0.6)]
    below = [(x, 1.01 - y) for x, y in reversed(teeth)]
    return [
        Part([*teeth, *right, *below, *left, (0.5 - 0.94 * wide, 0.3)], "body", "ball"),
        Part([(0.5 - wide, 0.1), (0.5 + wide, 0.1)], "core", "flat", 0.045),
        Part([(0.5 - wide, 0.92), (0.5 + wide, 0.92)], "core", "flat", 0.03),
    ]


def shirt(dice: Dice, *, sleeve: float, hem: float) -> list[Part]:
    chest = dice.uniform(0.25, 0.29)
    left, right = 0.5 - chest, 0.5 + chest
    elbow = (right + 0.2 * sleeve + 0.02, 0.22 + 0.46 * sleeve)
    cuff = (elbow[0] - 0.11, elbow[1] + 0.07)
    outline = [(0.5, 0.12), (0.6, 0.07), (right, 0.13), elbow, cuff, (right - 0.02, 0.32), (right, hem)]
    neck = curve([(0.6, 0.075), (0.56, 0.14), (0.5, 0.16), (0.44, 0.14), (0.4, 0.075)], closed=False)
    parts = [Part(mirrored(outline), "body", "cloth"), Part(neck, "core", "cloth", 0.03)]
    if sleeve > 0.6:
        hems = ([elbow, cuff], [(1 - x, y) for x, y in (elbow, cuff)], [(left, hem - 0.02), (right, hem - 0.02)])
        parts += [Part(line, "core", "cloth", 0.05) for line in hems]
    return parts


def dress(dice: Dice) -> list[Part]:
    waist, flare = dice.uniform(0.13, 0.16), dice.uniform(0.3, 0.38)
    right = [(0.6, 0.05), (0.64, 0.05), (0.66, 0.22), (0.5 + waist, 0.4), (0.5 + 0.7 * flare, 0.7), (0.5 + flare, 0.95)]
    return [
        Part(mirrored([(0.5, 0.16), *right, (0.5, 0.97)]), "body", "cloth"),
        Part([(0.5 - waist, 0.4), (0.5 + waist, 0.4)], "core", "cloth", 0.045),
    ]


def shorts(dice: Dice) -> list[Part]:
    leg = dice.uniform(0.36, 0.42)
    right = [(0.76, 0.16), (0.5 + leg + 0.04, 0.86), (0.56, 0.88), (0.5, 0.5)]
    return [
        Part(mirrored([(0.5, 0.16), *right]), "body", "cloth"),
        Part([(0.24, 0.17), (0.76, 0.17)], "core", "cloth", 0.08),
        Part([(0.5, 0.2), (0.5, 0.44)], "dark", "flat", 0.01),
    ]


def sneaker(dice: Dice) -> list[Part]:
    heel, toe = dice.uniform(0.3, 0.36), dice.uniform(0.54, 0.58)
    collar = [(0.07, 0.56), (0.1, heel), (0.19, heel + 0.07), (0.33, heel + 0.02), (0.4, heel - 0.02)]
    front = [(0.52, heel + 0.13), (0.7, toe), (0.86, toe + 0.01), (0.95, toe + 0.1), (0.94, 0.78)]
    laces = [[(x, heel + 0.67 * x - 0.2), (x - 0.05, heel + 0.5 * x - 0.01)] for x in (0.43, 0.49, 0.55, 0.61)]
    return [
        Part(curve([*collar, *front, (0.5, 0.79), (0.08, 0.78)]), "body", "cloth"),
        Part(plate(0.05, 0.75, 0.97, 0.87, 0.055), "white", "round"),
        Part([(0.07, 0.87), (0.94, 0.87)], "core", "flat", 0.025),
        *(Part(lace, "white", "flat", 0.02) for lace in laces),
    ]


def boot(dice: Dice) -> list[Part]:
    shaft = dice.uniform(0.4, 0.46)
    upper = [(0.2, 0.1), (0.2 + shaft, 0.1), (0.2 + shaft - 0.02, 0.52), (0.84, 0.64), (0.9, 0.78), (0.88, 0.88),
             (0.5, 0.89), (0.16, 0.88), (0.18, 0.5)]  # fmt: skip
    return [
        Part(curve(upper), "body", "cloth"),
        Part([(0.18, 0.11), (0.21 + shaft, 0.11)], "core", "cloth", 0.07),
        Part(plate(0.13, 0.86, 0.92, 0.94, 0.03), "dark", "round"),
    ]


def sock(dice: Dice) -> list[Part]:
    wide = dice.uniform(0.27, 0.32)
    outline = [(0.24, 0.06), (0.24 + wide, 0.06), (0.25 + wide, 0.5), (0.84, 0.72), (0.86, 0.88), (0.7, 0.94),
               (0.3, 0.84), (0.22, 0.6)]  # fmt: skip
    return [
        Part(curve(outline), "body", "cloth"),
        Part([(0.23, 0.08), (0.25 + wide, 0.08)], "core", "cloth", 0.08),
        Part(oval(0.8, 0.84, 0.17, 0.2), "core", "cloth"),
    ]


def beanie(dice: Dice) -> list[Part]:
    half = dice.uniform(0.34, 0.4)
    dome = turned([(0.02, 0.2), (0.62 * half, 0.28), (half, 0.56), (half, 0.8)])
    return [
        Part(oval(0.5, 0.16, 0.24, 0.22), "core", "ball"),
        Part(dome, "body", "ball"),
        Part(plate(0.47 - half, 0.7, 0.53 + half, 0.9, 0.07), "figure", "round"),
    ]


def cushion(dice: Dice) -> list[Part]:
    bulge = dice.uniform(0.07, 0.1)
    a, b = 0.06, 0.94
    edge = [(a, a), (0.5, a + bulge), (b, a), (b - bulge, 0.5), (b, b), (0.5, b - bulge), (a, b), (a + bulge, 0.5)]
    rim = curve(edge)
    return [Part(rim, "body", "ball"), Part([*rim, rim[0]], "core", "cloth", 0.02)]


def lamp(dice: Dice) -> list[Part]:
    top, foot = dice.uniform(0.14, 0.24), dice.uniform(0.16, 0.22)
    stem = dice.pick(([(0.02, 0.5), (0.1, 0.7), (0.03, 0.9)], [(0.035, 0.5), (0.035, 0.7), (0.035, 0.9)]))
    return [
        Part(turned(stem), "steel", "round"),
        Part(plate(0.5 - foot, 0.89, 0.5 + foot, 0.95, 0.025), "steel", "round"),
        Part(oval(0.5, 0.56, 0.72, 0.05), "glow"),
        Part(mirrored([(0.5 + top, 0.06), (0.88, 0.56)]), "body", "round"),
    ]


def umbrella(dice: Dice) -> list[Part]:
    low = dice.uniform(0.5, 0.56)
    scallops = [point for k in range(4) for point in arc(0.845 - 0.23 * k, low, 0.115, 0.05, 0, -180)]
    hook = [(0.5, 0.1), (0.5, 0.84), (0.54, 0.92), (0.62, 0.9), (0.63, 0.84)]
    return [
        Part(hook, "wood", "round", 0.03),
        Part([*arc(0.5, low, 0.46, low - 0.1, 180, 360), *scallops], "body", "ball"),
        Part([(0.5, 0.04), (0.5, 0.11)], "steel", "round", 0.022),
    ]


def phone_case(dice: Dice) -> list[Part]:
    half = dice.uniform(0.22, 0.26)
    camera = 0.5 - half + 0.1
    return [
        Part(plate(0.49 - half, 0.04, 0.51 + half, 0.97, 0.08), "dark", "flat"),
        Part(plate(0.5 - half, 0.045, 0.5 + half, 0.96, 0.07), "body", "flat"),
        Part(plate(camera - 0.06, 0.08, camera + 0.13, 0.27, 0.05), "dark", "flat"),
        Part(oval(camera, 0.14, 0.07, 0.07), "steel", "ball"),
        Part(oval(camera + 0.065, 0.21, 0.07, 0.07), "steel", "ball"),
    ]


def ball(dice: Dice) -> list[Part]:
    size = dice.uniform(0.84, 0.92)
    return [Part(oval(0.5, 0.5, size, size), "body", "ball")]


CATEGORIES: dict[str, Callable[[Dice], list[Part]]] = {
    "water bottle": lambda dice: bottle(dice, neck=0.12, body=0.24, top=0.15, shoulder=0.28, cap="core"),
    "olive oil": lambda dice: bottle(dice, neck=0.065, body=0.22, top=0.13, shoulder=0.38, cap="dark"),
    "shampoo": lambda dice: bottle(dice, neck=0.08, body=0.27, top=0.2, shoulder=0.34, cap="white"),
    "perfume": perfume,
    "cereal": lambda dice: carton(dice, width=0.56, height=0.82, depth=0.15),
    "tea box": lambda dice: carton(dice, width=0.7, height=0.5, depth=0.2),
    "gift box": lambda dice: carton(dice, width=0.64, height=0.6, depth=0.22, ribbon=True),
    "notebook": notebook,
    "jam": lambda dice: jar(dice, half=0.28, top=0.26, lid="core"),
    "face cream": lambda dice: jar(dice, half=0.38, top=0.5, lid="white", belly=1.0),
    "candle": candle,
    "soda": can,
    "mug": mug,
    "bowl": bowl,
    "vase": vase,
    "teapot": teapot,
    "plate": dish,
    "tote bag": tote,
    "handbag": handbag,
    "backpack": backpack,
    "crisps": snack_bag,
    "T-shirt": lambda dice: shirt(dice, sleeve=dice.uniform(0.2, 0.32), hem=0.94),
    "sweater": lambda dice: shirt(dice, sleeve=dice.uniform(0.95, 1.1), hem=0.88),
    "dress": dress,
    "shorts": shorts,
    "sneaker": sneaker,
    "boot": boot,
    "sock": sock,
    "beanie": beanie,
    "cushion": cushion,
    "lamp": lamp,
    "umbrella": umbrella,
    "phone case": phone_case,
    "beach ball": ball,
}
