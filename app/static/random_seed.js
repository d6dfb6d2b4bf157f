// A seed of four digits at most.
() => Math.floor(Math.random() * 10000)
