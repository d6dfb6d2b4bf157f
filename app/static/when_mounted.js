// Gradio mounts the contents of a tab or an accordion when it is first opened, and then fills them with the values it had
// before: a value that arrives meanwhile is lost. So nothing is drawn before its elements are in the document and filled.
// The event of a tab comes before the document shows it: the first look is a moment later.
// PLACES has, by the element that opens, the elements to wait for; the first value becomes the key of the open one.
(...values) => new Promise(done => {
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
    setTimeout(poll, 20);
})
