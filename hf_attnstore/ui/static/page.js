// Runs once when the page is there. The conversation that is open is in the address, after the #, which browsers keep to themselves.
() => {
  document.documentElement.classList.add("attnstore");
}
