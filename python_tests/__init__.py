"""The Python tests; a package because the benches read the same table of cases (`python_tests.cases`)."""
