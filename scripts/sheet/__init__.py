"""The cheat-sheet, raced: the races behind docs/sheet.md, its claims, and the page."""
