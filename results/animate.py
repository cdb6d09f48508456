"""Two players on the same lakes, side by side, as an SVG that moves: one untrained, one trained.

    python train.py --tiny --iterations 1 --out runs/untrained
    python train.py --tiny --out runs/trained
    python results/animate.py runs/untrained runs/trained --out results/animation.svg

Each folder is a run's or a model's. The lakes are held out, drawn by --seed; answers are sampled,
as in training; the shares under the titles are those of summary.json, of greedy answers. The SVG
moves by CSS alone, so that it also plays as an <img> in a page, as on GitHub. Where motion is
unwanted, it shows the end of the first lake.
"""

import argparse
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import frozenlake
import msgrpo
import train

STEP = 0.75  # seconds a move takes, its pause included
MOVE = 0.35  # seconds of it in motion
PAUSE = 0.9  # seconds before the first move
HOLD = 2.2  # seconds after the last move
CELL = 68  # side of a cell, and of all that follows, in pixels
PANEL = 400  # width of a panel
TOP = 84  # above the board
STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
         text-anchor: middle; fill: #23384d; }
  .title { font-size: 19px; font-weight: 600; }
  .note { font-size: 14px; fill: #5b7186; }
  .says { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
          font-size: 16px; }
  .won { font-size: 17px; font-weight: 600; fill: #187a45; }
  .lost { font-size: 17px; font-weight: 600; fill: #b3402e; }
  @media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
"""
PLAYER = (
    '<circle r="20" fill="#f08a24" stroke="#fff" stroke-width="3"/>'
    '<circle cx="-7" cy="-4" r="3" fill="#23384d"/><circle cx="7" cy="-4" r="3" fill="#23384d"/>'
    '<path d="M-7 6 Q0 12 7 6" fill="none" stroke="#23384d" stroke-width="2.5"/>'
)
GOAL = (
    '<path d="M-12 22 V-22" stroke="#23384d" stroke-width="3"/>'
    '<path d="M-12 -22 L18 -13 L-12 -3 Z" fill="#2aa864"/>'
)


@dataclass
class Episode:
    """What one player did on one lake."""

    states: list[int]  # before each answer, and the last
    texts: list[str]  # the answers
    tile: str  # where it ended, a letter of the map

    def outcome(self):
        """(class of the style, words)"""
        if self.tile == "G":
            return "won", f"reached the goal in {len(self.texts)} moves"
        if self.tile == "H":
            return "lost", "fell into a hole"
        return "lost", f"not there after {len(self.texts)} moves"


class Movie:
    """The elements of an SVG whose times are known, and the length of the whole."""

    def __init__(self, seconds, still):
        self.seconds = seconds
        self.still = still  # the moment that is shown where nothing moves
        self.styles = []
        self.elements = []

    def add(self, element):
        self.elements.append(element)

    def animate(self, element, timing, keys, still):
        """Add an element that moves by these keyframes; still: its look where nothing moves."""
        name = f"a{len(self.styles)}"
        animation = f"animation: {name} {self.seconds:.2f}s {timing} infinite"
        frames = " ".join(f"{100 * time / self.seconds:.2f}% {{{look}}}" for time, look in keys)
        self.styles.append(f".{name} {{{still}; {animation}}} @keyframes {name} {{{frames}}}")
        return f'<g class="{name}">{element}</g>'

    def show(self, element, start, end):
        """Show an element from start to end, in seconds."""
        keys = [(0, "opacity: 0"), (start, "opacity: 1"), (end, "opacity: 0")]
        is_shown = start <= self.still < end
        self.add(self.animate(element, "step-end", keys, f"opacity: {int(is_shown)}"))

    def move(self, element, places):
        """Move an element through (time, x, y, scale); show it from the first to the last time."""
        keys = []
        still = "opacity: 1"
        for time, x, y, scale in places:
            look = f"transform: translate({x}px, {y}px) scale({scale})"
            keys.append((time, look))
            if time <= self.still:
                still = look
        moving = self.animate(element, "ease-in-out", keys, still)
        self.show(moving, places[0][0], places[-1][0])

    def text(self):
        width = 2 * PANEL
        height = TOP + 4 * CELL + 64
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        head += f'width="{width}" height="{height}" role="img">'
        style = "\n".join(["<style>" + STYLE, *self.styles, "</style>"])
        paper = f'<rect width="{width}" height="{height}" rx="14" fill="#f7fafc"/>'
        return "\n".join([head, style, paper, *self.elements, "</svg>\n"])


def load(folder):
    """(settings, learner) of a run's or a model's folder."""
    settings = train.read_settings("play", folder, {})
    model, tokenizer, _ = train.load_model("play", folder, settings)
    return settings, train.Learner(settings, model, tokenizer)


def play(learner, settings, desc, number):
    """The Episode of a player on a lake."""
    lake = settings.lake(desc, settings.seed, number)
    states = [lake.state]
    player = learner.player(lake.instructions)
    episode = msgrpo.play(player, [lake], after_round=lambda *_: states.append(lake.state))[0]
    texts = [step.answer.text for step in episode]
    return Episode(states, texts, lake.tiles[lake.state])


def center(state, left):
    """The middle of a state's cell on a board whose left side is at `left`."""
    row, column = divmod(state, 4)
    return left + CELL * column + CELL // 2, TOP + CELL * row + CELL // 2


def board(desc, left):
    """The cells of a lake."""
    shapes = []
    for state, tile in enumerate("".join(desc)):
        x, y = center(state, left)
        corner = f'x="{x - CELL // 2 + 2}" y="{y - CELL // 2 + 2}"'
        side = CELL - 4
        shapes.append(f'<rect {corner} width="{side}" height="{side}" rx="9" fill="#d9ecf8"/>')
        if tile == "H":
            shapes.append(f'<ellipse cx="{x}" cy="{y}" rx="25" ry="23" fill="#1d3a57"/>')
        if tile == "G":
            shapes.append(f'<g transform="translate({x},{y})">{GOAL}</g>')
    return "".join(shapes)


def label(x, y, kind, words):
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(printable[:40])}</text>'


def add_episode(movie, episode, desc, left, start, end):
    """One player's episode on one lake, from start to end in seconds."""
    middle = left + 2 * CELL
    below = TOP + 4 * CELL + 36
    movie.show(board(desc, left), start, end)
    places = [(start, *center(episode.states[0], left), 1)]
    time = start + PAUSE
    for text, before, after in zip(episode.texts, episode.states, episode.states[1:]):
        movie.show(label(middle, below, "says", text), time, time + STEP)
        places.append((time, *center(before, left), 1))
        places.append((time + MOVE, *center(after, left), 1))
        time += STEP
    last = center(episode.states[-1], left)
    scale = {"H": 0.3, "G": 1.2}.get(episode.tile, 1)
    places.append((time, *last, 1))
    places.append((time + MOVE, *last, scale))
    places.append((end, *last, scale))
    movie.move(PLAYER, places)
    movie.show(label(middle, below, *episode.outcome()), time, end)


def notes(folder):
    """(seconds of training, share of the held-out lakes crossed) of a run that ended, else None."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    return summary["seconds"], summary["unseen_success"]


def add_frame(movie, folders):
    """What stands above and below the boards all the time."""
    titles = ["before MS-GRPO", "after MS-GRPO"]
    trained = notes(folders[1])
    if trained is not None:
        titles[1] = f"after {trained[0]:.0f} s of MS-GRPO"
    for i, folder in enumerate(folders):
        middle = PANEL * i + PANEL // 2
        movie.add(label(middle, 36, "title", titles[i]))
        figures = notes(folder)
        if figures is not None:
            words = f"crosses {figures[1]:.1%} of the lakes it never saw"
            movie.add(label(middle, 60, "note", words))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("untrained", type=Path, help="folder of a run or a model")
    parser.add_argument("trained", type=Path, help="folder of a run or a model")
    parser.add_argument("--seed", type=int, default=0, help="draws the lakes")
    parser.add_argument("--lakes", type=int, default=3, help="how many, one after the other")
    parser.add_argument("--out", type=Path, default=Path("animation.svg"), help="the SVG")
    args = parser.parse_args()
    folders = [args.untrained, args.trained]
    players = [load(folder) for folder in folders]
    if any(settings.scenario != "noslip" for settings, _ in players):
        parser.error("it draws runs of the scenario noslip alone")
    rng = train.generator(args.seed)
    scenario = frozenlake.SCENARIOS["noslip"]
    maps = [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(args.lakes)]
    scenes = []  # of each lake: both episodes
    ends = [0.0]  # seconds, of each scene's end
    for number, desc in enumerate(maps):
        scenes.append([play(learner, settings, desc, number) for settings, learner in players])
        longest = max(len(episode.texts) for episode in scenes[-1])
        ends.append(ends[-1] + PAUSE + STEP * longest + HOLD)
    movie = Movie(ends[-1], still=ends[1] - HOLD / 2)
    add_frame(movie, folders)
    for desc, episodes, start, end in zip(maps, scenes, ends, ends[1:]):
        for i, episode in enumerate(episodes):
            left = PANEL * i + (PANEL - 4 * CELL) // 2
            add_episode(movie, episode, desc, left, start, end)
    args.out.write_text(movie.text())
    print(f"{args.out}: {ends[-1]:.0f} s, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
