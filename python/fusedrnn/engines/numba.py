"""The Numba engine."""


class NumbaEngine:
    name = "numba"
    traceable = False

    def available(self):
        return "not written"

    def supports(self, call):
        return "not written"
