// The first computation imports much; it begins once the picture is there, else it would slow down the loading of the page.
(...values) => new Promise(done => {
    const began = Date.now();
    const poll = () => document.querySelector('#way img') || Date.now() - began > 1000
        ? setTimeout(() => done(values), 200) : setTimeout(poll, 50);
    poll();
})
