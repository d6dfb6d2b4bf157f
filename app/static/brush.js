// The HTML element with the target under a grid of its tokens. Dragging over tokens chooses them, or takes them away where
// the first was chosen; a click on "all tokens" empties the choice.
const cells = () => [...element.querySelectorAll('.token')];
const chosen = () => cells().flatMap((cell, number) => cell.getAttribute('aria-pressed') === 'true' ? [number] : []);
const set = (cell, on) => cell.setAttribute('aria-pressed', on);
let painting = null;
const send = () => trigger('select', {index: chosen(), value: ''});
element.addEventListener('pointerdown', event => {
    const cell = event.target.closest('.token');
    if (!cell) return;
    event.preventDefault();
    painting = cell.getAttribute('aria-pressed') !== 'true';
    set(cell, painting);
});
element.addEventListener('pointermove', event => {
    const cell = painting === null ? null : document.elementFromPoint(event.clientX, event.clientY)?.closest('.token');
    if (cell && element.contains(cell)) set(cell, painting);
});
window.addEventListener('pointerup', () => {
    if (painting === null) return;
    painting = null;
    send();
});
element.addEventListener('click', event => {
    if (event.target.closest('.all')) {
        cells().forEach(cell => set(cell, false));
        send();
    } else if (event.target.closest('.token') && event.detail === 0) {  // by the keyboard
        set(event.target, event.target.getAttribute('aria-pressed') !== 'true');
        send();
    }
});
