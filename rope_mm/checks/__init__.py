"""One clear sentence for bad input: values of fields, names of arguments, packages that are missing."""
