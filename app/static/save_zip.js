// A browser saves what a click requests.
() => document.querySelector('#samples-file').click()
