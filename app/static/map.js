// The HTML element around the maps of the tab "Map". It listens to the graphs, which are replaced at every drawing: a click
// picks an image, the mouse shows its thumbnail, and a zoom stays while the map is the same.
const card = element.querySelector('.card'), picture = card.querySelector('i'), words = card.querySelector('span');
const known = new WeakSet(), zooms = {};
const at = (gd, event) => {
    const sheet = props.value.sheets[gd.layout.meta.run], image = event.points[0].customdata;
    return sheet && image !== undefined ? [sheet, image - sheet.first] : [null, 0];
};
const hide = () => { card.hidden = true; };
function attach(gd) {
    known.add(gd);
    gd.setAttribute('role', 'figure');
    gd.setAttribute('aria-label', gd.layout.meta.label);
    gd.on('plotly_click', event => {
        const [sheet, row] = at(gd, event);
        hide();
        if (sheet) trigger('select', {index: row});
    });
    gd.on('plotly_hover', event => {
        const [sheet, row] = at(gd, event);
        if (!sheet) return;
        const x = row % sheet.columns, y = Math.floor(row / sheet.columns);
        picture.style.backgroundImage = `url(${sheet.address})`;
        picture.style.backgroundSize = `${sheet.columns * 96}px auto`;
        picture.style.backgroundPosition = `${-96 * x}px ${-96 * y}px`;
        words.textContent = sheet.words[row];
        card.hidden = false;
        const {clientX, clientY} = event.event;
        card.style.left = `${clientX > innerWidth / 2 ? clientX - 132 : clientX + 20}px`;
        card.style.top = `${Math.max(4, Math.min(clientY - 150, innerHeight - 150))}px`;
    });
    gd.on('plotly_unhover', hide);
    gd.on('plotly_relayout', () => {
        const {xaxis, yaxis} = gd.layout;
        const zoomed = xaxis.autorange === false || yaxis.autorange === false;
        zooms[gd.layout.meta.run] = zoomed ? [gd.layout.meta.map, [...xaxis.range], [...yaxis.range]] : null;
    });
    const [map, x, y] = zooms[gd.layout.meta.run] || [];
    if (map === gd.layout.meta.map && window.Plotly) Plotly.relayout(gd, {'xaxis.range': x, 'yaxis.range': y});
}
const attachAll = () => element.querySelectorAll('.js-plotly-plot').forEach(gd => {
    if (!known.has(gd) && gd.on && gd.layout?.meta) attach(gd);
});
new MutationObserver(attachAll).observe(element, {childList: true, subtree: true});
document.addEventListener('scroll', hide, true);
attachAll();
