"""One module per revision, `r<number>_<what>`. A revision that was released is never changed again."""
