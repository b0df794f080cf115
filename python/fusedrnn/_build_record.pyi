BUILT_WITH: str
COMMIT: str
NOT_BUILT: dict[str, str]
