"""Whatever a prompt is made of, and however often its line is added, the ledger holds it once, as it came."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from db.clips import add_clips
from db.requests import open_request
from tests.factories import clear, new_clip, new_request

# All that UTF-8 can write but NUL, which the prompt reader refuses; and what a COPY stream gives a meaning of its own.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
SIGNS = st.text(st.sampled_from("\\\t\n\r\b\f\v.N'\",;{}\u20ac\U0001f534\u2028 x"), min_size=1, max_size=12)
PROMPTS = st.lists(st.one_of(WORDS, SIGNS), min_size=1, max_size=8)


@given(prompts=PROMPTS, twice=st.integers(0, 8))
@example(
    prompts=["\\N", "\\.", "\\", "a\tb", "a\nb\r\n", "\\x41\\101", "'; drop table clips; --", "\U0001f3ac"], twice=3
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_words_come_back_as_they_came(ledger: sessionmaker[Session], prompts: list[str], twice: int) -> None:
    clips = [
        new_clip(index, prompt=words, negative_prompt=words[::-1], custom_id=f"{index} {words}")
        for index, words in enumerate(prompts)
    ]
    with ledger.begin() as session:
        request = open_request(session, new_request()).id
        first = add_clips(session, request, clips[:twice])
        assert first == len(clips[:twice])
        assert add_clips(session, request, iter(clips)) == len(clips) - first
        stored = session.execute(text('select prompt, negative_prompt, custom_id from clips order by "index"'))
        assert [tuple(row) for row in stored] == [(clip.prompt, clip.negative_prompt, clip.custom_id) for clip in clips]
        clear(session)
