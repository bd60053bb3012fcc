"""A tool for tests: its arguments have few values."""

from typing import Literal

import openai
import pydantic


class Weather(pydantic.BaseModel):
    """How the weather is."""

    unit: Literal["c", "f"]
    day: int = pydantic.Field(ge=0, le=6)


TOOL = openai.pydantic_function_tool(Weather)
