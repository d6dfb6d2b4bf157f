// The link of the open view, into the clipboard where the browser allows it, and always into the field below the button.
(query) => {
    const link = location.origin + location.pathname + query;
    if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
    history.replaceState(null, '', query);
    return link;
}
