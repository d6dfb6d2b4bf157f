// The pad opens with its hand tool; the brush is there a moment after the tab is.
() => {
    const began = Date.now();
    const select = () => {
        const brush = document.querySelector("#pad button[title='Brush']");
        if (brush && !brush.classList.contains('highlight')) brush.click();
        if (!brush && Date.now() - began < 5000) setTimeout(select, 100);
    };
    select();
}
