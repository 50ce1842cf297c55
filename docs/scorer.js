// The scores of Sphinx's search, but pages that say what to do come before pages that only mention a word
var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    score + (page === "commands" ? 3 : page.startsWith("tutorials/") ? 2 : page === "changelog" ? -4 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
