// Open the accordion with the view as code, and scroll to it.
() => {
    const accordion = document.querySelector('#code');
    const head = accordion.querySelector('button');
    if (!head.classList.contains('open')) head.click();
    accordion.scrollIntoView({block: 'center'});
}
