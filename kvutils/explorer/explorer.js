export default { render({ el }) { el.textContent = "The browser side of the explorer is not here yet."; } };
