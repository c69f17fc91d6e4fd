// A page that is left in the middle of an answer cuts its own connections, which Gradio's script logs as errors (it hears of
// the leaving before any listener of ours could). So errors are shown half a second late: those of the leaving, never.
const say = console.error
console.error = (...words) => setTimeout(say, 500, ...words)
