"""Facts of a cache -> one HTML page that needs nothing but itself. Everything that comes from the cache is hostile: see
`shared.page`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape as e
from importlib import resources
from typing import Any

import numpy as np

from shared.inspect import cards, charts, words
from shared.inspect.failures import Failure
from shared.inspect.gather import Facts, LatentsFacts
from shared.inspect.statistics import OUTLIER_SCORE, STATISTICS, Statistics
from shared.inspect.words import num_bytes, plural
from shared.page import assemble, base_style, script_json

_SHOWN_REASON = 1000
_SHOWN_PROBLEMS = 50
_SHOWN_REASONS = 100
_SHOWN_OF_REASON = 12
_SHOWN_OUTLIERS = 12


def page(facts: Facts, made_at: datetime) -> str:
    """The page. `made_at` is the time that it states."""
    parts = {
        "title": e(_name(facts)),
        "header": _header(facts, made_at),
        "layers": _layers(facts),
        "sizes": _sizes(facts),
        "captions": _captions(facts),
        "latents": _latents(facts),
        "failures": _failures(facts),
        "gallery": _gallery_lead(facts),
        "num_samples": f"{len(facts.gallery.samples):,}",
        "num_outliers": f"{cards.num_outliers(facts):,}",
        "data": script_json(cards.data(facts)),
    } | {f"{name}_options": _options(choices) for name, choices in cards.choices(facts).items()}
    return assemble(_file("template.html"), parts, style=base_style() + _file("style.css"), script=_file("app.js"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _options(choices: Iterable[cards.Choice]) -> str:
    return "".join(
        f'<option value="{e(choice.value)}">{e(choice.text)} ({choice.num_samples:,})</option>' for choice in choices
    )


def _name(facts: Facts) -> str:
    """The last part of the cache's folder or URL."""
    return facts.where.rstrip("/").rpartition("/")[2] or facts.where


# The head of the page


def _header(facts: Facts, made_at: datetime) -> str:
    manifest = facts.manifest
    num_sound = facts.num_samples - len(facts.failures.left_out)
    conditions = manifest["conditions"]
    with_conditions = f"with the condition{'s' * (len(conditions) != 1)} {e(_listed(conditions))}"
    sentence = (
        f"{plural(num_sound, 'sample')} of {plural(facts.num_images, 'image')} for {e(manifest['family'].upper())}, "
        f"{with_conditions if conditions else 'without a condition'}"
        f"{f'; {facts.num_prior:,} of the samples are class images' if facts.num_prior else ''}."
    )
    model = manifest["model"]
    revision = f" at {model['revision'][:8]}" if model["revision"] else ""
    entries = [
        ("Cache", f"<code>{e(facts.where)}</code>"),
        ("Encoders", f"<code>{e(model['name'] + revision)}</code>"),
        ("Schema version", str(manifest["schema_version"])),
        ("Looked at", e(f"{made_at:%Y-%m-%d %H:%M}")),
    ]
    failed, out = len(facts.failures.listed), len(facts.outliers)
    figures = [
        (f"{num_sound:,}", "samples", ""),
        (f"{facts.num_captions:,}", "distinct captions", ""),
        (num_bytes(sum(layer.num_bytes for layer in facts.layers)), f"in {plural(len(facts.layers), 'layer')}", ""),
        (f"{failed:,}", "failure" if failed == 1 else "failures", "bad" if failed else ""),
        (f"{out:,}", "outlier" if out == 1 else "outliers", "odd" if out else ""),
    ]
    boxes = []
    if facts.problems:
        items = "".join(f"<li>{e(problem)}</li>" for problem in facts.problems[:_SHOWN_PROBLEMS])
        more = len(facts.problems) - _SHOWN_PROBLEMS
        rest = f"<p>And {more:,} more. <code>make verify</code> names all.</p>" if more > 0 else ""
        boxes.append(f'<aside class="box bad" role="alert"><h2>Damage</h2><ul>{items}</ul>{rest}</aside>')
    if facts.notes:
        items = "".join(f"<li>{e(note)}</li>" for note in facts.notes)
        boxes.append(f'<aside class="box"><h2>Not shown</h2><ul>{items}</ul></aside>')
    return (
        f'<p class="eyebrow">Underdrawing cache</p><h1>{e(_name(facts))}</h1><p class="sentence">{sentence}</p>'
        f'<dl class="facts">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)}</dl>'
        f'<ul class="figures">{"".join(_figure(*figure) for figure in figures)}</ul>{"".join(boxes)}'
    )


def _figure(value: str, label: str, kind: str) -> str:
    return f'<li class="{kind}"><strong>{value}</strong> <span>{label}</span></li>'


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


# Totals


def _table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table of cells that are HTML already. `head`: (text, class) of each column; "n" for numbers."""
    columns = "".join(f'<th scope="col" class="{kind}">{e(text)}</th>' for text, kind in head)
    lines = []
    for row in rows:
        cells = [
            f'<td class="{column}" data-label="{e(text)}">{cell}</td>' if i else f'<th scope="row">{cell}</th>'
            for i, ((text, column), cell) in enumerate(zip(head, row, strict=True))
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<table class="{kind}"><caption>{e(caption)}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _count(value: int, kind: str = "bad") -> str:
    """A number that should be zero."""
    return f'<span class="{kind}">{value:,}</span>' if value else '<span class="quiet">0</span>'


_READS = {
    "image": "from the images",
    "conditioning_image": "from the drawings that came with the images",
    "caption": "from the captions",
}
"""What a layer is made from, in words."""


def _layers(facts: Facts) -> str:
    fingerprints = {layer.summary.name: layer.summary.fingerprint for layer in facts.layers}
    rows = []
    for layer in facts.layers:
        summary = layer.summary
        settings = words.recipe(summary.recipe, fingerprints)
        made_from = _READS[summary.reads]
        if other := next((word.value for word in settings if word.value in fingerprints), None):
            made_from = f"from layer {other}"
        listed = "".join(
            f"<li><span>{e(word.label)}</span> "
            + (f'<code title="{e(word.whole)}">{e(word.value)}</code>' if word.whole else f"<b>{e(word.value)}</b>")
            + "</li>"
            for word in settings
            if word.value not in fingerprints
        )
        unused = f'<span class="quiet"> and {layer.num_unused:,} unused</span>' if layer.num_unused > 0 else ""
        rows.append((
            f'<strong>{e(summary.name)}</strong><span class="reads">{e(made_from)}</span>'
            f'<ul class="recipe">{listed}</ul>',
            f"{layer.num_rows:,}{unused}",
            _count(layer.num_errors),
            f"{len(summary.shards):,}",
            num_bytes(layer.num_bytes),
            f'<code title="{e(summary.fingerprint)}">{e(summary.fingerprint[:8])}</code>',
        ))  # fmt: skip
    head = [("Layer", ""), ("Rows", "n"), ("Errors", "n"), ("Shards", "n"), ("On disk", "n"), ("Fingerprint", "n")]
    return _table(head, rows, "Layers of the cache, and what each was made by", "wide")


def _sizes(facts: Facts) -> str:
    most = max((bucket.num_train + bucket.num_validation for bucket in facts.buckets), default=1)
    rows = [
        (
            f"{_shape(bucket.width, bucket.height)}<strong>{words.size(bucket.width, bucket.height)}</strong>"
            f'<span class="reads">{words.aspect(bucket.width, bucket.height)}</span>',
            _bar(bucket.num_train / most, bucket.num_validation / most),
            f"{bucket.num_train:,}",
            f"{bucket.num_validation:,}",
            _count(bucket.num_incomplete),
            f"{bucket.num_shards:,}",
            num_bytes(bucket.num_bytes),
        )
        for bucket in facts.buckets
    ]
    head = [
        ("Bucket", ""), ("Samples", "bars"), ("Train", "n"), ("Validation", "n"), ("Incomplete", "n"), ("Shards", "n"),
        ("On disk", "n"),
    ]  # fmt: skip
    table = _table(head, rows, "Samples by bucket: the pixels that were encoded. Text is not counted", "wide buckets")
    if not len(facts.sizes):
        return table
    width, height, bucket_width, bucket_height = facts.sizes.T
    enlarged = (bucket_width > width) | (bucket_height > height)
    short = np.minimum(width, height)
    sides = charts.histogram_svg(
        charts.count(short, enlarged),
        name="sizes-chart",
        title="Short side of the images",
        x_label="short side of the image in pixels",
        y_label="images",
        description=f"{_spread(short, 'px')} {_share(int(enlarged.sum()), len(short), 'is', 'are')} enlarged.",
        marked_label="enlarged",
    )
    from_to = f"From {charts.number((width / height).min())}:1 to {charts.number((width / height).max())}:1."
    ratios = np.clip(np.log2(width / height), -4, 4)
    # Bins of a quarter of a doubling, around 1:1 and the same on both sides of it.
    edges = (np.arange(np.round(ratios.min() * 4), np.round(ratios.max() * 4) + 2) - 0.5) / 4
    ticks = [(float(k), f"1:{2**-k}" if k < 0 else f"{2**k}:1") for k in range(-4, 5)]
    if edges[-1] - edges[0] < 3:
        ticks += [(float(np.log2(w / h)), f"{w}:{h}") for w, h in ((2, 3), (3, 2))]
    aspects = charts.histogram_svg(
        charts.count(ratios, edges=edges),
        name="aspects-chart",
        title="Aspect ratios of the images",
        x_label="width : height",
        y_label="images",
        description=from_to,
        ticks=[(value, text) for value, text in ticks if edges[0] <= value <= edges[-1]],
        bin_label=lambda low, high: f"{2**low:.2f}:1 to below {2**high:.2f}:1",
    )
    small = f"{_share(int(enlarged.sum()), len(short), 'is', 'are')} smaller than the bucket and enlarged."
    return table + _charts(
        (sides, "Short side", _spread(short, "px"), small if enlarged.any() else ""),
        (aspects, "Aspect ratio", from_to, ""),
    )


def _shape(width: int, height: int) -> str:
    """A small rectangle of a bucket's shape."""
    scale = 18 / max(width, height)
    w, h = max(2.0, width * scale), max(2.0, height * scale)
    return (
        f'<svg class="shape" viewBox="0 0 20 20" aria-hidden="true"><rect x="{10 - w / 2:.1f}" y="{10 - h / 2:.1f}" '
        f'width="{w:.1f}" height="{h:.1f}" rx="1"/></svg>'
    )


def _bar(first: float, second: float) -> str:
    """A bar of two parts, in shares of the whole width."""
    return (
        '<svg class="rowbar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" width="{100 * first:.2f}" height="10"/>'
        f'<rect class="bar second" x="{100 * first:.2f}" width="{100 * second:.2f}" height="10"/></svg>'
    )


def _charts(*entries: tuple[str, str, str, str]) -> str:
    """Charts side by side: (SVG, heading, what it says in words, what the marked part of it says)."""
    figures = []
    for svg, heading, text, marked in entries:
        about = f"<p>{e(text)}</p>" + (f'<p class="marks">{e(marked)}</p>' if marked else "")
        figures.append(f"<figure><figcaption><h3>{e(heading)}</h3>{about}</figcaption>{svg}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _spread(values: Any, unit: str) -> str:
    middle, least, most = (charts.number(float(of(values))) for of in (np.median, np.min, np.max))
    return f"Median {middle}{f' {unit}' if unit else ''}, from {least} to {most}."


def _share(part: int, whole: int, one: str, several: str) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %) {one if part == 1 else several}"


# Captions


def _captions(facts: Facts) -> str:
    if not facts.num_captions:
        return '<p class="lead">No sample has a caption.</p>'
    shown = []
    lead = f"{plural(facts.num_captions, 'distinct caption')}."
    tokens, limit = facts.caption_tokens, facts.text_length
    if tokens is not None and len(tokens):
        over = tokens > (limit or np.inf)
        if len(tokens) < facts.num_captions:
            lead += f" Tokens were counted of {len(tokens):,} of them, drawn with a fixed seed."
        said, cut_off = _spread(tokens, "tokens"), ""
        if over.any():
            cut_off = f"{_share(int(over.sum()), len(tokens), 'is', 'are')} cut off after {limit} tokens."
        elif limit is not None:
            said += f" All fit into the {limit} that are encoded."
        values = np.append(tokens, limit) if limit is not None else tokens
        edges = charts.round_edges(values.astype(np.float64))
        svg = charts.histogram_svg(
            charts.count(tokens, over, edges),
            name="tokens-chart",
            title="Caption lengths in tokens",
            x_label="tokens, the end token counted",
            y_label="captions",
            description=f"{said} {cut_off}",
            marked_label="cut off",
            line=None if limit is None else (limit, f"{limit} encoded"),
        )
        shown.append((svg, "Tokens", said, cut_off))
    else:
        lead += " Their tokens could not be counted, see above; characters stand in for them."
    characters = facts.caption_characters
    svg = charts.histogram_svg(
        charts.count(characters),
        name="characters-chart",
        title="Caption lengths in characters",
        x_label="characters",
        y_label="captions",
        description=_spread(characters, "characters"),
    )
    shown.append((svg, "Characters", _spread(characters, "characters"), ""))
    return f'<p class="lead">{lead}</p>{_charts(*shown)}'


# Latents


def _latents(facts: Facts) -> str:
    if not facts.latents:
        return '<p class="lead">No layer of latents could be read.</p>'
    num_sound = facts.num_samples - len(facts.failures.left_out)
    over = (
        f"over all {plural(num_sound, 'sample')}"
        if facts.num_measured == num_sound
        else f"over {facts.num_measured:,} of {num_sound:,} samples, drawn with a fixed seed "
        "(<code>--statistics-samples</code> sets how many)"
    )
    lead = (
        f'<p class="lead">Measured {over}, as stored: neither shifted nor scaled.</p>'
        '<p class="formula">How far a sample stands out is the largest |<var>z</var>| of its mean, std, min and max, '
        "where <span><var>z</var> = 0.6745 (<var>x</var> &minus; median) / MAD</span> "
        "and MAD is the median of |<var>x</var> &minus; median| over the samples of the layer. "
        f"Beyond {OUTLIER_SCORE} it is called an outlier (Iglewicz and Hoaglin, 1993).</p>"
    )
    in_gallery = {sample.row["key"] for sample in facts.gallery.samples}
    return lead + "".join(_layer_of_latents(entry, in_gallery) for entry in facts.latents)


def _layer_of_latents(entry: LatentsFacts, in_gallery: set[str]) -> str:
    statistics, name = entry.statistics, e(entry.layer)
    outliers = statistics.outliers
    finite = np.isfinite(statistics.samples).all(axis=1)
    if not finite.any():
        return f"<h3>{name}</h3><p>Nothing in it could be measured.</p>"
    channels = statistics.channels
    parts = [(
        charts.ranges_svg(
            channels, name=f"{name}-channels", title=f"{entry.layer}: range of each channel", x_label="channel",
            y_label="value", description=f"{len(channels)} channels; the table below has the numbers.",
            width=charts.NARROW,
        ),
        "Channels", "From min to max, one std around the mean.", "",
    )]  # fmt: skip
    stands_out = np.zeros(len(statistics.keys), bool)
    stands_out[outliers] = True
    for column in (0, 1):
        which = STATISTICS[column]
        values = statistics.samples[finite, column]
        svg = charts.histogram_svg(
            charts.count(values, stands_out[finite]), name=f"{name}-{which}",
            title=f"{entry.layer}: {which} of each sample", x_label=f"{which} of a sample", y_label="samples",
            description=_spread(values, ""), marked_label="outliers", width=charts.NARROW,
        )  # fmt: skip
        heading = "Mean of each sample" if which == "mean" else "Standard deviation of each sample"
        parts.append((svg, heading, _spread(values, ""), f"{plural(len(outliers), 'outlier')}." if outliers else ""))
    channel_head = [("Channel", ""), *((which, "n") for which in STATISTICS)]
    channel_rows = [(str(k), *(charts.number(value, 4) for value in row)) for k, row in enumerate(channels.tolist())]
    return (
        f'<section class="latents"><h3>{name}</h3><p class="meaning">{e(entry.meaning)}</p>{_charts(*parts)}'
        f"{_farthest(statistics, outliers, in_gallery)}"
        f"<details><summary>Numbers of every channel</summary>"
        f"{_table(channel_head, channel_rows, f'{entry.layer}: every channel')}</details></section>"
    )


def _farthest(statistics: Statistics, outliers: Sequence[int], in_gallery: set[str]) -> str:
    if not outliers:
        return '<p class="quiet">No sample stands out.</p>'
    rows, scores = [], statistics.scores
    for row in outliers[:_SHOWN_OUTLIERS]:
        cells = []
        for column, value in enumerate(statistics.samples[row].tolist()):
            z = float(statistics.z[row, column])
            told = charts.number(value, 4) if np.isfinite(value) else "not finite"
            far = abs(z) > OUTLIER_SCORE
            cells.append(f'<span class="odd">{told} <small>{_z(z)}</small></span>' if far else told)
        rows.append((_sample_link(statistics.keys[row], in_gallery), f"{scores[row]:.1f}", *cells))
    head = [("Sample", ""), ("Score", "n"), *((which, "n") for which in STATISTICS)]
    more = len(outliers) - len(rows)
    rest = f'<p class="quiet">And {more:,} more; the gallery filters and sorts by them.</p>' if more > 0 else ""
    return _table(head, rows, "Farthest out first", "wide") + rest


def _z(z: float) -> str:
    return f"z {z:+.1f}".replace("-", "\u2212") if np.isfinite(z) else ""


def _sample_link(key: str, in_gallery: set[str]) -> str:
    name = f'<code class="key">{e(key)}</code>'
    return f'<a href="#sample={e(key)}">{name}</a>' if key in in_gallery else name


# Failures


def _failures(facts: Facts) -> str:
    listed = facts.failures.listed
    if not listed:
        return '<p class="lead">None: every sample and every caption is in every layer.</p>'
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in listed:
        groups.setdefault((failure.where, failure.reason), []).append(failure)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    in_gallery = {sample.row["key"] for sample in facts.gallery.samples}
    rows = []
    for (where, reason), members in largest[:_SHOWN_REASONS]:
        named = "".join(f"<li>{_failed(member, in_gallery)}</li>" for member in members[:_SHOWN_OF_REASON])
        more = len(members) - _SHOWN_OF_REASON
        rest = f'<li class="quiet">and {more:,} more</li>' if more > 0 else ""
        rows.append((
            f"<strong>{e(words.cut(reason, _SHOWN_REASON))}</strong>",
            e(where),
            f"{len(members):,}",
            f'<ul class="names">{named}{rest}</ul>',
        ))  # fmt: skip
    num_left_out, num_incomplete = len(facts.failures.left_out), len(facts.failures.incomplete)
    counted = [
        f"{plural(number, 'sample')} {'is' if number == 1 else 'are'} {what}"
        for number, what in (
            (num_left_out, "left out: no layer has any of it"),
            (num_incomplete, "incomplete: some layer has nothing for it or for one of its captions"),
        )
        if number
    ]
    lead = f"{'. '.join(counted)}. Training does without." if counted else ""
    unlisted = sum(len(members) for _, members in largest[_SHOWN_REASONS:])
    rest = (
        f'<p class="quiet">And {unlisted:,} more for other reasons: samples.parquet and the indexes of the shards have '
        "each.</p>"
        if unlisted
        else ""
    )
    head = [("Reason", ""), ("Where", ""), ("How many", "n"), ("Which", "")]
    return f'<p class="lead">{lead}</p>{_table(head, rows, "Failures, the most frequent first", "wide")}{rest}'


def _failed(failure: Failure, in_gallery: set[str]) -> str:
    name = f"<bdi>{e(words.cut(failure.what, 120))}</bdi>"
    return f'<a href="#sample={e(failure.key)}">{name}</a>' if failure.key in in_gallery else name


# The gallery


def _gallery_lead(facts: Facts) -> str:
    gallery, num_sound = facts.gallery, facts.num_samples - len(facts.failures.left_out)
    all_drawn = gallery.num_drawn == num_sound
    shown = [
        f"All {plural(num_sound, 'sample')}"
        if all_drawn
        else f"{gallery.num_drawn:,} of {num_sound:,} samples, drawn with a fixed seed "
        "(<code>--samples</code> sets how many)"
    ]
    if failed := len(facts.failures.left_out) + len(facts.failures.incomplete):
        shown.append("all failures" if all_drawn or failed <= gallery.num_drawn else "the first failures")
    if facts.outliers and not all_drawn:
        shown.append("all outliers" if len(facts.outliers) <= gallery.num_drawn else "the farthest outliers")
    pictures = (
        f"Pictures are decoded from layer <code>{e(gallery.picture_layer)}</code> by the VAE of "
        f"<code>{e(facts.picture_model)}</code>"
        if gallery.picture_layer is not None
        else "The latents were not decoded: a sample's first drawing stands in for its picture"
    )
    return f'<p class="lead">{", and ".join(shown)}. {pictures}. No picture here is larger than {gallery.side} px.</p>'
