// Comes last: marks the page as drawn, with the milliseconds since the navigation began.
Promise.allSettled(page.pending).then(() => {
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
});
