BUILT_WITH: str
NOT_BUILT: dict[str, str]
