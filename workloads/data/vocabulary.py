"""Words the simulated catalogue is written with: categories, product types, materials, styles, colours.

Data only. Colours and styles are shared by all categories, so that a taste for one of them shows in
every category; product types and materials belong to one category.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CategoryWords:
    """How products of one category are called.

    `base_price` is the median price of its cheapest product type. `weekend` and `evening` are log
    multipliers of how much more the category is visited then. `restocked` categories are bought again.
    """

    name: str
    nouns: tuple[str, ...]
    materials: tuple[str, ...]
    uses: tuple[str, ...]
    base_price: float
    weekend: float = 0.0
    evening: float = 0.0
    restocked: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


COLOURS = _words(
    "black, white, grey, navy, forest green, mustard, terracotta, blush pink, sky blue, burgundy, sand, violet"
)
STYLES = _words(
    "minimal, vintage, rustic, modern, floral, striped, nordic, industrial, boho, classic, playful, geometric"
)

CATEGORIES: tuple[CategoryWords, ...] = (
    CategoryWords(
        "kitchen",
        _words("mixing bowl, saucepan, chef knife, cutting board, storage jar, tea kettle, frying pan, measuring cup"),
        _words("stainless steel, enamel, bamboo, cast iron, borosilicate glass"),
        _words("everyday cooking, baking at home, small kitchens, batch cooking"),
        14.0,
        weekend=0.2,
    ),
    CategoryWords(
        "tableware",
        _words("dinner plate, coffee mug, wine glass, serving tray, cutlery set, soup bowl, milk jug, napkin ring"),
        _words("stoneware, porcelain, crystal, acacia wood, brushed brass"),
        _words("family dinners, Sunday brunch, garden parties, a quiet breakfast"),
        9.0,
        evening=0.2,
    ),
    CategoryWords(
        "bedding",
        _words("duvet cover, pillowcase, fitted sheet, throw blanket, mattress topper, quilt, bed skirt, bolster"),
        _words("organic cotton, linen, bamboo viscose, washed percale, flannel"),
        _words("warm sleepers, guest rooms, winter nights, sensitive skin"),
        22.0,
        evening=0.4,
    ),
    CategoryWords(
        "lighting",
        _words("table lamp, pendant light, floor lamp, string lights, wall sconce, desk lamp, night light, lantern"),
        _words("rattan, frosted glass, matte metal, paper, concrete"),
        _words("reading corners, hallways, terraces, children's rooms"),
        19.0,
        evening=0.5,
    ),
    CategoryWords(
        "furniture",
        _words("side table, bookshelf, dining chair, coffee table, shoe rack, bar stool, nightstand, writing desk"),
        _words("solid oak, walnut veneer, powder-coated steel, bouclé, reclaimed pine"),
        _words("small flats, home offices, open living rooms, narrow halls"),
        75.0,
        weekend=0.5,
    ),
    CategoryWords(
        "garden",
        _words("plant pot, watering can, garden trowel, bird feeder, fire bowl, deck chair, raised bed, hose reel"),
        _words("galvanised steel, teak, glazed clay, recycled plastic, slate"),
        _words("balconies, herb gardens, shady corners, long summers"),
        16.0,
        weekend=0.7,
    ),
    CategoryWords(
        "toys",
        _words("building blocks, puzzle, plush bear, toy train, board game, doll house, shape sorter, kite"),
        _words("beech wood, felt, organic cotton jersey, cardboard, silicone"),
        _words("rainy days, small hands, first birthdays, the whole family"),
        12.0,
        weekend=0.5,
    ),
    CategoryWords(
        "baby",
        _words("swaddle blanket, teether, nursing pillow, changing mat, bib, baby carrier, crib mobile, sleep sack"),
        _words("muslin, merino wool, food-grade silicone, bamboo terry, organic jersey"),
        _words("newborns, short naps, trips with a pram, the nursery"),
        13.0,
        evening=0.3,
    ),
    CategoryWords(
        "stationery",
        _words("notebook, fountain pen, desk organiser, wall calendar, washi tape, planner, pencil case, letter set"),
        _words("recycled paper, brass, vegan leather, cork, linen cloth"),
        _words("meeting notes, sketching, long letters, the first day of term"),
        6.0,
        weekend=-0.4,
    ),
    CategoryWords(
        "office",
        _words("laptop stand, monitor riser, office chair, cable box, desk mat, filing cabinet, footrest, whiteboard"),
        _words("aluminium, bent plywood, mesh, wool felt, tempered glass"),
        _words("standing desks, shared offices, video calls, tidy minds"),
        24.0,
        weekend=-0.7,
    ),
    CategoryWords(
        "electronics",
        _words("wireless earbuds, bluetooth speaker, power bank, phone case, smart plug, charger, webcam, keyboard"),
        _words("anodised aluminium, braided nylon, matte polycarbonate, silicone shell, carbon fibre"),
        _words("long commutes, desk setups, travel days, loud kitchens"),
        27.0,
        evening=0.3,
    ),
    CategoryWords(
        "photo",
        _words("camera strap, tripod, photo album, lens pouch, picture frame, memory card case, softbox, instant film"),
        _words("waxed canvas, magnesium alloy, full-grain leather, ripstop nylon, ash wood"),
        _words("street photography, portraits, holidays, home studios"),
        21.0,
        weekend=0.2,
    ),
    CategoryWords(
        "outdoor",
        _words("camping tent, sleeping bag, headlamp, trekking pole, dry bag, camp stove, hammock, water bottle"),
        _words("ripstop polyester, titanium, merino blend, goose down, tritan"),
        _words("weekend hikes, alpine huts, kayak tours, cold mornings"),
        32.0,
        weekend=0.6,
    ),
    CategoryWords(
        "fitness",
        _words("yoga mat, resistance band, kettlebell, foam roller, jump rope, gym bag, push-up bar, balance board"),
        _words("natural rubber, neoprene, cast steel, cork composite, recycled nylon"),
        _words("home workouts, recovery days, early mornings, strong backs"),
        17.0,
        evening=0.2,
    ),
    CategoryWords(
        "cycling",
        _words("bike helmet, frame bag, tail light, bike lock, cycling gloves, floor pump, bell, pannier"),
        _words("hardened steel, waxed cotton, EPS foam, reflective nylon, machined alloy"),
        _words("daily commutes, gravel rides, night rides, family tours"),
        23.0,
        weekend=0.3,
    ),
    CategoryWords(
        "womens clothing",
        _words("midi dress, knit sweater, wrap blouse, wide trousers, denim jacket, cardigan, skirt, trench coat"),
        _words("merino, viscose crepe, organic denim, mulberry silk, linen blend"),
        _words("office days, garden weddings, cool evenings, travelling light"),
        36.0,
        evening=0.3,
    ),
    CategoryWords(
        "mens clothing",
        _words("oxford shirt, chino trousers, crew neck tee, wool overshirt, polo shirt, hoodie, parka, belt"),
        _words("supima cotton, selvedge denim, lambswool, corduroy, brushed twill"),
        _words("casual Fridays, layering, city weekends, cold platforms"),
        34.0,
        evening=0.2,
    ),
    CategoryWords(
        "shoes",
        _words("leather sneaker, ankle boot, loafer, running shoe, sandal, slipper, rain boot, espadrille"),
        _words("nubuck, vegetable-tanned leather, knitted mesh, natural rubber sole, suede"),
        _words("long walks, wet streets, summer evenings, the office"),
        48.0,
        weekend=0.2,
    ),
    CategoryWords(
        "bags",
        _words("tote bag, backpack, crossbody bag, weekender, toiletry bag, laptop sleeve, card holder, belt bag"),
        _words("waxed canvas, pebbled leather, recycled polyester, cotton twill, cork fabric"),
        _words("short trips, market days, carry-on only, everyday carry"),
        29.0,
    ),
    CategoryWords(
        "jewellery",
        _words("hoop earrings, pendant necklace, signet ring, charm bracelet, ear cuff, anklet, brooch, cufflinks"),
        _words("sterling silver, gold vermeil, freshwater pearl, rose gold, hammered brass"),
        _words("anniversaries, everyday wear, wedding guests, layering"),
        31.0,
        evening=0.4,
    ),
    CategoryWords(
        "beauty",
        _words("face cream, hair oil, lip balm, clay mask, shower gel, hand soap, body scrub, bath salts"),
        _words("shea butter, argan, oat milk, green tea, sea salt"),
        _words("dry skin, evening routines, sensitive skin, long baths"),
        8.0,
        evening=0.4,
        restocked=True,
    ),
    CategoryWords(
        "coffee and tea",
        _words("espresso beans, filter coffee, green tea, herbal infusion, chai blend, cold brew, cocoa, matcha"),
        _words("single origin, fair trade, dark roast, organic leaf, small batch"),
        _words("slow mornings, afternoon breaks, french press, moka pots"),
        9.0,
        weekend=0.1,
        restocked=True,
    ),
    CategoryWords(
        "pets",
        _words("dog collar, cat tree, chew toy, pet bed, food bowl, dog treats, litter mat, travel crate"),
        _words("hemp rope, oat straw, memory foam, salmon, stitched leather"),
        _words("restless puppies, senior cats, long drives, fussy eaters"),
        11.0,
        weekend=0.1,
        restocked=True,
    ),
    CategoryWords(
        "household",
        _words("laundry detergent, dish brush, candle, room spray, storage basket, cloth, soap dispenser, refill tabs"),
        _words("plant-based, soy wax, seagrass, beeswax, recycled fibre"),
        _words("spring cleaning, small bathrooms, hard water, fresh laundry"),
        7.0,
        weekend=0.3,
        restocked=True,
    ),
)  # fmt: skip

BRANDS = _words(
    "Alder & Finch, Nordhaven, Casa Lume, Brightwater, Oak & Thread, Maren, Tollgate, Hearthline, Velden, Sollis, "
    "Petrel, Quillon, Fernway, Lumen Lane, Harrow & Co, Isla Verde, Kestrel, Montane, Rowan Street, Studio Aske, "
    "Tidemark, Umber, Wickham, Yarrow"
)
