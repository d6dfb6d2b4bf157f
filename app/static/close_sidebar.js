// On a phone the sidebar covers the page: it begins closed there.
() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }
