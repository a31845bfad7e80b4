"""The word list: what people call the things of the world, in each list the most usual words first.

The rewriter's training prompts are made of these words (`model.world.phrasings`), and in use they have the last word
where they are sure (`model.world.lexicon`). Add a word here: the word list knows it at once, the network after its next
training.
"""

from __future__ import annotations

import re


def phrases(text: str) -> tuple[str, ...]:
    """Phrases parted by commas; - is the empty phrase."""
    return tuple("" if phrase.split() == ["-"] else " ".join(phrase.split()) for phrase in text.split(","))


def mirror(phrase: str) -> str:
    """The phrase with left and right exchanged."""
    return re.sub("left|right", lambda found: {"left": "right", "right": "left"}[found[0]], phrase)


COLOUR_WORDS = {
    "red": phrases(
        """red, crimson, scarlet, ruby, ruby-red, cherry, cherry-red, vermilion, vermillion, burgundy, maroon,
        cardinal, carmine, brick-red, wine-red, blood-red, tomato-red, garnet, fire-engine red, strawberry
        red, candy-apple red, reddish, rust-red, claret"""
    ),
    "green": phrases(
        """green, emerald, lime, lime-green, olive, jade, jade-green, mint, mint-green, forest-green, moss-green,
        mossy, sage, pistachio, kelly green, shamrock, avocado, grass-green, pea-green, viridian,
        bottle-green, apple-green, greenish, malachite, fern, neon green"""
    ),
    "blue": phrases(
        """blue, azure, navy, navy-blue, cobalt, cobalt-blue, sapphire, ultramarine, cerulean, sky-blue,
        royal-blue, cornflower, cornflower-blue, denim, ocean-blue, steel-blue, lapis, prussian blue, electric
        blue, bluish, baby-blue, midnight-blue"""
    ),
    "yellow": phrases(
        """yellow, golden, gold, lemon, lemon-yellow, canary, canary-yellow, mustard, sunflower,
        sunflower-yellow, banana, banana-yellow, blond, blonde, daffodil, buttercup, maize, straw-coloured,
        butter-yellow, yellowish, saffron, sunny yellow, flaxen"""
    ),
    "orange": phrases(
        """orange, tangerine, amber, apricot, carrot, carrot-orange, pumpkin, copper, peach, clementine,
        mandarin, marigold, persimmon, papaya, burnt orange, orangish, terracotta, rust-orange"""
    ),
    "purple": phrases(
        """purple, violet, lavender, lilac, plum, mauve, grape, amethyst, aubergine, eggplant, orchid, mulberry,
        indigo, purplish, royal purple, heather, wisteria, deep purple"""
    ),
    "pink": phrases(
        """pink, rose, rosy, rose-pink, fuchsia, blush, blush-pink, bubblegum, bubblegum-pink, salmon, hot pink,
        magenta, flamingo, coral, carnation, candy-floss, pinkish, baby-pink, salmon-pink"""
    ),
    "cyan": phrases(
        """cyan, turquoise, teal, aqua, aquamarine, aqua-blue, peacock, sea-green, turquoise-blue, blue-green,
        tiffany blue, teal-blue"""
    ),
}
SHAPE_WORDS = {
    "sphere": phrases(
        """sphere, ball, orb, globe, marble, bead, bubble, spheroid, balloon, bowling ball, beach ball, rubber
        ball, basketball, football, spherical thing, round thing, ball-shaped object, pearl, planet"""
    ),
    "cube": phrases(
        """cube, box, block, crate, dice, die, cuboid, brick, parcel, package, carton, boxy thing, cubic thing,
        cube-shaped object, chest, wooden crate, cardboard box, toy block, square box"""
    ),
    "cylinder": phrases(
        """cylinder, can, barrel, drum, tin, tin can, tube, pipe, canister, keg, column, pillar, soda can, oil
        drum, cylindrical thing, cylindrical object, beer can, roller, jar, soup can"""
    ),
    "cone": phrases(
        """cone, traffic cone, funnel, pylon, party hat, conical thing, cone-shaped object, teepee, ice-cream
        cone, conical hat, pyramid, spike"""
    ),
}
FLOOR_WORDS = {
    "checkered": phrases(
        """checkered floor, chessboard, tiles, chequered floor, checkerboard, checkered, chequered, tiled floor,
        chessboard floor, checkerboard floor, checked floor, marble tiles, kitchen tiles, kitchen floor,
        checker pattern, black and white tiles, chess board, tile floor, chequerboard, tiling, draughtboard"""
    ),
    "grey": phrases(
        """grey floor, grey ground, concrete, asphalt, cement, pavement, tarmac, parking lot, car park, gray
        floor, gray ground, concrete floor, road, street, sidewalk, slate, stone floor, warehouse floor, grey
        surface, gray surface, driveway, grey, gray"""
    ),
    "sand": phrases(
        """sandy floor, sand, desert, sandy, dunes, sand dunes, beach, sandy beach, shore, dune, sahara, desert
        sand, golden sand, sandpit, seashore, sandy ground, desert floor"""
    ),
    "grass": phrases(
        """lawn, grass, meadow, green lawn, green meadow, field, turf, pasture, prairie, grassland, park, garden,
        grassy, green field, grassy field, grassy hill, backyard, football pitch, lush grass, village green,
        mown grass"""
    ),
}
SKY_WORDS = {
    "day": phrases(
        """clear sky, sunny day, daylight, by day, sunny, daytime, noon, midday, blue sky, sunshine, broad
        daylight, cloudless sky, morning, high noon, bright day, clear blue sky, afternoon, sunlight, sunlit,
        bright sun, noonday, blazing sun, sun is shining, full sun, day, summer day, sun shines, bright sky,
        sun beats down"""
    ),
    "sunset": phrases(
        """sunset, evening sky, evening, dusk, sundown, twilight, golden hour, setting sun, sun goes down, sun
        sets, orange sky, red sky, gloaming, sunset sky, dawn, sunrise, orange sunset, pink sky, last light,
        day is ending, sun is setting, fiery sky, purple sky"""
    ),
    "night": phrases(
        """night, dark sky, in the dark, midnight, moonlight, starry sky, nighttime, night sky, moonlit, under
        the stars, after dark, darkness, nocturnal, moonless night, black sky, starry night, the dark, dead of
        night, full moon, pitch dark, pitch black, nite, stars, beneath the moon, starlight,
        through the dark"""
    ),
}
_FILMED_LEFT = {
    "static": phrases(
        """the camera is static, the camera does not move, static shot, a fixed camera, locked-off shot, tripod
        shot, static camera, fixed camera, camera locked off, stationary camera, the camera stays still, still
        camera, the camera is stationary, camera on a tripod, the camera doesn't move, locked camera, no
        camera movement, camera stays put, camera fixed"""
    ),
    "orbit left": phrases(
        """the camera orbits to the left, the camera circles left, the camera orbits left, orbit left, orbit shot
        left, camera arcs around to the left, the camera swings around to the left, slow orbit to the left,
        circling it to the left, orbiting left, the camera travels around it to the left, arc shot to the
        left, camera revolves around it leftwards, the camera moves around it to the left, camera circling
        leftward, we circle around to the left, orbital shot to the left, camera goes round it to the left,
        left orbit"""
    ),
    "pan left": phrases(
        """the camera pans left, the camera turns to the left, the camera pans to the left, pan left, left pan,
        slow pan to the left, panning left, pan leftward, the camera sweeps left, the view turns left, camera
        swivels to the left, the camera looks to the left, camera rotates left, pan from right to left, whip
        pan left, turn the camera left, panning shot to the left"""
    ),
    "dolly in": phrases(
        """the camera dollies in, the camera moves in, the camera pushes in, dolly in, push in, zoom in, zooming
        in, slow push-in, camera moves closer, the camera approaches, the camera closes in, slow zoom in,
        camera gets nearer, dolly forward, zooms in, the camera comes closer, camera pushes forward, push-in
        shot, dollying in, we move in, push in on, tracking in, zoom"""
    ),
    "dolly out": phrases(
        """the camera dollies out, the camera moves back, the camera pulls back, dolly out, zoom out, pull back,
        pull out, slow pull-back, the camera retreats, the camera backs off, camera backs away, zooming out,
        zooms out, the camera moves away, dolly back, pulling back, pull-out shot, camera pulls away, we pull
        back, camera draws back, dollying out, pull back from, camera pulls out, the camera moves backwards"""
    ),
}
FILMED_AS = _FILMED_LEFT | {mirror(name): tuple(map(mirror, phrases)) for name, phrases in _FILMED_LEFT.items()}

LEFTWARD = phrases(
    """left, to the left, leftward, leftwards, towards the left, toward the left, off to the left, over to the left,
    to the left side, to the left hand side, to the left-hand side, from right to left, right to left, leftward
    across the frame, left across the screen, off the left edge"""
)
RIGHTWARD = tuple(mirror(phrase) for phrase in LEFTWARD)
SLIDES = phrases(
    """slide, move, glide, travel, roll, drift, creep, scoot, slink, skate, float, crawl, coast, sail, shift, wander,
    head, go, dash, race, zip, cruise, rush, amble, trundle, shoot, scurry, inch, sweep, run, stroll, make its
    way, veer, saunter, dart, skid"""
)
OBSERVER = phrases(
    """us, me, the camera, the viewer, the lens, the audience, you, the screen, the observer, the spectator"""
)
# What the verbs of each motion are followed by; {us} is any OBSERVER. To the left and right go SLIDES with LEFTWARD.
ACTS = {
    "still": (
        (
            phrases("stand, sit, rest, stay, remain, lie, keep, hold, wait"),
            phrases(
                """still, motionless, at rest, in place, perfectly still, completely still, immobile, unmoving, where
                it is, put, on the ground"""
            ),
        ),
        (
            phrases("sit, stand, rest"),
            phrases("there, on the floor, quietly, -"),
        ),
        (
            phrases("not move, not budge, not stir, not go anywhere"),
            phrases("-, at all, an inch"),
        ),
        (
            phrases("is motionless, is stationary, is at rest, is still, is immobile, is static, is parked"),
            phrases("-"),
        ),
    ),
    "bounce": (
        (
            phrases("bounce, hop, jump, leap, spring, bob, skip"),
            phrases("-, -, up and down, in place, happily, on the spot, again and again, repeatedly, high"),
        ),
        (
            phrases("pop, boing, bob, go"),
            phrases("up and down"),
        ),
    ),
    "spin": (
        (
            phrases("spin, rotate, twirl, whirl, pirouette, revolve, swivel, gyrate"),
            phrases(
                "-, -, around, in place, on its axis, on the spot, round and round, like a top, slowly, around itself"
            ),
        ),
        (
            phrases("turn"),
            phrases("around, in place, on its axis, round and round, on the spot, about its own axis"),
        ),
    ),
    "closer": (
        (
            phrases("come, move, creep, roll, slide, draw, inch, get"),
            phrases(
                "closer, nearer, ever closer, closer and closer, nearer and nearer, closer to {us}, nearer to {us}"
            ),
        ),
        (
            phrases("move, slide, hurtle, come, race, roll, charge, head, fly, speed, rush, glide"),
            phrases("towards {us}, toward {us}, straight at {us}, right at {us}, at {us}"),
        ),
        (
            phrases("approach, advance upon, advance on, close in on, near, loom towards, bear down on"),
            phrases("{us}"),
        ),
        (
            phrases("approach, advance, draw near, grow larger, get bigger, come forward, move forward"),
            phrases("-"),
        ),
    ),
    "away": (
        (
            phrases("move, go, slide, drift, roll, travel, glide, creep, head, speed, float, run, race"),
            phrases(
                """away, away from {us}, into the distance, off into the distance, further away, further and further
                away, farther away, to the horizon, towards the horizon"""
            ),
        ),
        (
            phrases("recede, retreat, withdraw, vanish, disappear, shrink, fade"),
            phrases("into the distance, from view, into the horizon, from {us}, towards the horizon"),
        ),
        (
            phrases("recede, retreat, get smaller, get farther away, grow smaller, back away, depart"),
            phrases("-"),
        ),
    ),
    "behind": (
        (
            phrases(
                """pass, move, slide, go, roll, glide, hide, duck, disappear, travel, slip, vanish, run, creep, drift,
                sneak"""
            ),
            phrases("behind, behind, around the back of"),
        ),
    ),
}
# Words of prompts that say nothing of the world.
STYLE = phrases(
    """cinematic, 8k, 4k, masterpiece, highly detailed, hyperrealistic, photorealistic, trending on artstation,
    octane render, unreal engine, shallow depth of field, bokeh, 35mm film, shot on 35mm, film grain, in slow
    motion, soft light, volumetric light, dramatic, minimalist, please, thanks, thank you, best quality, wide
    shot, close-up, medium shot, establishing shot, low angle, award-winning, in the style of pixar, studio
    lighting, 3d animation, wide angle, ultra hd, beautiful composition, very simple, epic, moody, dreamlike,
    loopable, 24 fps, anamorphic, hdr, vibrant colours, calm mood, silent, music video, for my kids, no text, low
    poly, raytraced, just that, sharp focus, nice and slow, as simple as possible, for a commercial"""
)
OPENINGS = phrases(
    """a video of, a clip of, I want, please make, could you show, imagine, generate, we see, show me, picture this:,
    I'd love to see, an animation of, footage of, render, there is, once upon a time there was, a scene with, make a
    movie of, can you animate, a shot of, a short film about, I would like, film, please animate, somewhere there
    is, behold, give me, a picture of, I am looking for, scene:, let there be, in this video, the story of, we are
    watching, a view of, an image of, my idea:, here goes:"""
)
DECOR = phrases(
    """big, small, huge, tiny, shiny, glossy, matte, lone, lonely, solitary, enormous, smooth, old, little, perfect,
    simple, polished, giant, beautiful, gleaming, large, metallic, wooden, plastic, tall, proud, heavy, graceful,
    mysterious, glowing, dusty, brand-new, majestic, humble, silent, rubber, glass, painted, weathered, cute,
    happy"""
)
# What mini's world does not have.
FOREIGN_THINGS = phrases(
    """dog, cat, car, man, woman, child, tree, house, bird, horse, boat, ship, robot, dragon, castle, city, mountain,
    river, airplane, train, bicycle, flower, fish, elephant, spaceship, king, wizard, table, chair, lamp, guitar,
    piano, phone, laptop, cup of coffee, pizza, cake, book, dancer, astronaut, soldier, monkey, lion, tiger,
    snake, bee, butterfly, waterfall, volcano, island, bridge, tower, skyscraper, truck, motorcycle, tractor,
    rocket, satellite, whale, shark, kitten, puppy, bear, rabbit, mouse, cow, pig, sheep, duck, penguin, owl,
    eagle, dinosaur, unicorn, mermaid, knight, pirate, ninja, samurai, chef, doctor, teacher, student, baby, girl,
    boy, family, crowd, couple, old lady, businessman, torus, star, donut, tetrahedron, hexagon, shoe, hat, dress,
    umbrella, window, door, fence, candle, clock, mirror, vase, bottle, bell, sword, shield, Eiffel Tower, forest,
    ocean, lake, cloud, rainbow, snowman, ghost, zombie, vampire, alien, teapot, spoon, kite, swing"""
)
FOREIGN_COLOURS = phrases(
    """white, black, brown, silver, transparent, striped, beige, multicoloured, colourless, grey"""
)
# Verbs that double their last letter before -ing.
DOUBLED = frozenset(
    phrases("""hop, spin, skip, sit, zip, pop, bob, slip, run, put, get, skid, trot, jog, step, skim, swim, whiz, pan,
    stop, set, begin, drag, flit""")
)

# Words that hold sentences together.
FUNCTION_WORDS = phrases(
    """a, an, the, this, that, these, those, it, its, i, me, my, we, us, our, you, your, he, she, they, them, is, are,
    was, be, been, being, am, do, does, did, has, have, had, will, would, can, could, should, may, might, must,
    shall, let, lets, s, d, ll, m, re, ve, not, no, yes, and, or, but, so, as, if, then, than, while, when, where,
    which, who, what, whose, how, why, of, on, in, at, to, from, for, with, without, by, over, under, up, down, off,
    out, into, onto, upon, about, across, around, through, beneath, below, above, between, among, during, before,
    after, until, again, once, only, just, very, really, quite, too, also, all, any, some, each, every, both, one,
    two, here, there, now, please, like, want, need, make, see, look, show, get, got, go, goes, going, way, thing,
    things, something, object, objects, coloured, colored, hued, tinted, colour, color, bright, deep, pale, light,
    vivid, dull, soft, warm, slowly, quickly, fast, slow, gently, smoothly, own, same, other, another, more, most,
    much, many, little, bit, lot, exactly, ever, still, yet, kind, sort, somewhere, entire, whole, single, lit,
    against, empty, wide, endless, bathed, set, place, scene, world, shot, both, together,
    few, long, short, full, last, dead, high, broad, surely, own, sets"""
)

# Words that mean something else as easily: "can you", "depth of field", "a beach ball", "a marble floor", "all day".
UNSURE = phrases(
    """can, tin, marble, brick, die, drum, column, rose, gold, golden, cherry, olive, copper, peach, day, stars, field,
    park, garden, grey, gray, sandy, football, stand, stay, run, go, rest, near, keep, hold, wait, block, chest,
    package, planet, box, pipe, tube, road, street, morning, balloon, bubble, shore, fern, sage, denim, grape,
    heather, evening, spike, grassy, jar, roller, turn, zoom, pearl, bead, lie, spring, parcel, still, the dark"""
)
