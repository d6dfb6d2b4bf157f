"""JavaScript that the page runs in the browser."""

import json
from collections.abc import Mapping, Sequence

# the link of the open view, into the clipboard where the browser allows it, and always into the field below the button
COPY_LINK = """(query) => {
    const link = location.origin + location.pathname + query;
    if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
    history.replaceState(null, '', query);
    return link;
}"""
# on a phone the sidebar covers the page: it begins closed there
CLOSE_SIDEBAR = "() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"
RANDOM_SEED = "() => Math.floor(Math.random() * 10000)"
# the first computation imports much; it begins once the picture is there, else it would slow down the loading of the page
WHEN_PAINTED = """(...values) => new Promise(done => {
    const began = Date.now();
    const poll = () => document.querySelector('#way img') || Date.now() - began > 1000
        ? setTimeout(() => done(values), 200) : setTimeout(poll, 50);
    poll();
})"""
# gradio mounts the contents of a tab or an accordion when it is first opened, and then fills them with the values it had
# before: a value that arrives meanwhile is lost. So nothing is drawn before its elements are in the document and filled.
# PLACES has, by the element that opens, the elements to wait for; the first value becomes the key of the open one.
_WHEN_MOUNTED = """(...values) => new Promise(done => {
    const places = PLACES, began = Date.now();
    const visible = element => element && getComputedStyle(element).display != 'none';
    const poll = () => {
        const open = Object.keys(places).find(place => visible(document.querySelector(place)));
        const mounted = open && places[open].every(place => document.querySelector(place));
        mounted || Date.now() - began > 3000 ? wait(2, open) : setTimeout(poll, 20);
    };
    const answer = open => done(values.map((value, k) => k ? value : open ?? ''));
    const wait = (frames, open) => frames
        ? requestAnimationFrame(() => wait(frames - 1, open)) : setTimeout(answer, 20, open);
    poll();
})"""
OPEN_CODE = """() => {
    const accordion = document.querySelector('#code');
    const head = accordion.querySelector('button');
    if (!head.classList.contains('open')) head.click();
    accordion.scrollIntoView({block: 'center'});
}"""


def when_mounted(places: Mapping[str, Sequence[str]]) -> str:
    """Wait until the element that opened holds its elements.

    Args:
        places: selector of what can open -> selectors of the elements inside that must be there.
    """
    return _WHEN_MOUNTED.replace("PLACES", json.dumps(places))
